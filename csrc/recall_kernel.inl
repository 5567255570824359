// Codes of 4 bits: logits of queries from them, and the codes of keys. See recall.h.

constexpr int kVectorsPerPair = 2 * static_cast<int>(kCodesPerWord) / kLanes;
constexpr int kMaxCodeChannels = 64 + 2 * static_cast<int>(kCodesPerWord);

// One number as the cache's type holds it.
BUDGETKV_INLINE float read_one(const float* from) { return *from; }
BUDGETKV_INLINE void write_one(float* to, float number) { *to = number; }
template <class T>
BUDGETKV_INLINE float read_one(const T* from) {
  typename T::Bits bits = {};
  bits[0] = from->bits;
  return widen(T{}, bits)[0];
}
template <class T>
BUDGETKV_INLINE void write_one(T* to, float number) {
  to->bits = narrow(T{}, splat(number))[0];
}

// The codes of kLanes channels of a pair of words, from channel `part * kLanes` of it on.
BUDGETKV_INLINE Vec unpack_codes(uint32_t low, uint32_t high, int part) {
  Uint words, shift;
  for (int i = 0; i < kLanes; ++i) {
    const int channel = part * kLanes + i;
    words[i] = channel < static_cast<int>(kCodesPerWord) ? low : high;
    shift[i] = kCodeBits * (channel % static_cast<int>(kCodesPerWord));
  }
  return __builtin_convertvector(bitcast<Int>((words >> shift) & 15), Vec);
}

// Channels of the scratch for a query: those of the codes, in whole pairs of words.
BUDGETKV_INLINE int64_t padded_channels(int64_t num_words) {
  return (num_words + 1) / 2 * 2 * kCodesPerWord;
}

// q.k = scale q.m + sum_r a_r (code_r - 7.5) with a_r = scale q s of its channel: writes the a,
// then the rest.
template <class T>
static void prepare_queries(const IndexQuery& query, const void* digest, float* scratch) {
  const int64_t size = query.head_size, num_channels = query.num_words * kCodesPerWord;
  const int64_t width = padded_channels(query.num_words);
  const T* mean = static_cast<const T*>(digest);
  float steps[kMaxCodeChannels];
  int channels[kMaxCodeChannels];
  for (int64_t r = 0; r < num_channels; ++r) {
    steps[r] = read_one(mean + size + r);
    const float channel = read_one(mean + size + num_channels + r);
    channels[r] = channel > 0.0f && channel < size ? static_cast<int>(channel) : 0;
  }
  for (int64_t g = 0; g < query.num_queries; ++g) {
    const float* q = query.queries + g * size;
    float* factors = scratch + g * width;
    Vec sum = Vec{};
    for_each_vector(
        size, [&](int i, bool is_tail) { sum += load(q + i, is_tail) * load(mean + i, is_tail); });
    float base = query.scale * reduce_add(sum);
    for (int64_t r = 0; r < width; ++r) {
      factors[r] = r < num_channels ? query.scale * q[channels[r]] * steps[r] : 0.0f;
      base -= 0.5f * kMaxCode * factors[r];
    }
    scratch[query.num_queries * width + g] = base;
  }
}

static void prepare(const IndexQuery& query, const void* digest, float* scratch) {
  BUDGETKV_FOR_FLOAT_TYPE(query.type, prepare_queries, query, digest, scratch);
}

void index_logits(const IndexQuery& query, const int32_t* codes, const void* digest,
                  int64_t num_entries, float* scratch, float* logits, int64_t stride) {
  prepare(query, digest, scratch);
  const int64_t words = query.num_words, width = padded_channels(words);
  const int64_t vectors = width / kLanes;
  const float* bases = scratch + query.num_queries * width;
  Vec unpacked[kLanes * kMaxCodeChannels / kLanes];
  for (int64_t first = 0; first < num_entries; first += kLanes) {
    const int64_t count = num_entries - first < kLanes ? num_entries - first : kLanes;
    Vec* next = unpacked;
    for (int64_t t = 0; t < kLanes; ++t) {
      // behind the last entry stands what is never stored
      const int32_t* entry = codes + (first + (t < count ? t : 0)) * words;
      for (int64_t w = 0; w < words; w += 2) {
        const int32_t high = w + 1 < words ? entry[w + 1] : 0;
        for (int part = 0; part < kVectorsPerPair; ++part) {
          *next++ = unpack_codes(entry[w], high, part);
        }
      }
    }
    for (int64_t g = 0; g < query.num_queries; ++g) {
      const float* factors = scratch + g * width;
      Vec rows[kLanes];
      for (int t = 0; t < kLanes; ++t) {
        Vec sum = Vec{};
        const Vec* entry = unpacked + t * vectors;
        for (int64_t v = 0; v < vectors; ++v) sum += entry[v] * load(factors + v * kLanes);
        rows[t] = sum;
      }
      const Vec found = reduce_each(rows) + bases[g];
      float* to = logits + g * stride + first;
      if (count == kLanes) {
        store(to, found);
      } else {
        for (int64_t t = 0; t < count; ++t) to[t] = found[t];
      }
    }
  }
}

void index_mass(float* logits, int64_t num_queries, int64_t num_tokens, int64_t stride,
                float* mass) {
  const int64_t whole = num_tokens / kLanes * kLanes;
  for (int64_t j = 0; j < num_tokens; ++j) mass[j] = 0.0f;
  for (int64_t g = 0; g < num_queries; ++g) {
    float* row = logits + g * stride;
    float peak = -__builtin_inff();
    Vec peaks = splat(peak);
    for (int64_t j = 0; j < whole; j += kLanes) peaks = max(peaks, load(row + j));
    peak = reduce_max(peaks);
    for (int64_t j = whole; j < num_tokens; ++j) peak = row[j] > peak ? row[j] : peak;
    Vec totals = Vec{};
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec weight = exp(load(row + j) - peak);
      totals += weight;
      store(row + j, weight);
    }
    float total = reduce_add(totals);
    for (int64_t j = whole; j < num_tokens; ++j) {
      row[j] = exp(splat(row[j] - peak))[0];
      total += row[j];
    }
    const float share = 1.0f / total;
    for (int64_t j = 0; j < whole; j += kLanes) {
      store(mass + j, load(mass + j) + load(row + j) * share);
    }
    for (int64_t j = whole; j < num_tokens; ++j) mass[j] += row[j] * share;
  }
}

template <class T>
static void average_keys_as(const void* const* keys, int64_t num_tokens, int64_t entry_tokens,
                            int64_t head_size, FloatType mean_type, void* means) {
  int64_t place = 0;
  for (int64_t first = 0; first < num_tokens; first += entry_tokens, place += head_size) {
    const int64_t count = num_tokens - first < entry_tokens ? num_tokens - first : entry_tokens;
    for_each_vector(head_size, [&](int channel, bool is_tail) {
      const auto key = [&](int64_t t) {
        return load(static_cast<const T*>(keys[first + t]) + channel, is_tail);
      };
      Vec sum = key(0);
      for (int64_t t = 1; t < count; ++t) sum += key(t);
      store_as(mean_type, means, place + channel, sum / static_cast<float>(count), is_tail);
    });
  }
}

void average_keys(FloatType key_type, const void* const* keys, int64_t num_tokens,
                  int64_t entry_tokens, int64_t head_size, FloatType mean_type, void* means) {
  BUDGETKV_FOR_FLOAT_TYPE(key_type, average_keys_as, keys, num_tokens, entry_tokens, head_size,
                          mean_type, means);
}

template <class T>
static void measure_keys_as(const void* const* keys, int64_t num_tokens, int64_t head_size,
                            float* means, float* variances) {
  for_each_vector(head_size, [&](int channel, bool is_tail) {
    const auto key = [&](int64_t t) {
      return load(static_cast<const T*>(keys[t]) + channel, is_tail);
    };
    Vec sum = Vec{};
    for (int64_t t = 0; t < num_tokens; ++t) sum += key(t);
    const Vec mean = sum / static_cast<float>(num_tokens);
    Vec squares = Vec{};
    for (int64_t t = 0; t < num_tokens; ++t) squares += (key(t) - mean) * (key(t) - mean);
    store(means + channel, mean, is_tail);
    store(variances + channel, squares / static_cast<float>(num_tokens), is_tail);
  });
}

void measure_keys(FloatType type, const void* const* keys, int64_t num_tokens, int64_t head_size,
                  float* mean, float* variance) {
  BUDGETKV_FOR_FLOAT_TYPE(type, measure_keys_as, keys, num_tokens, head_size, mean, variance);
}

template <class T>
static void encode_page_as(const void* const* keys, int64_t num_tokens, int64_t head_size,
                           int64_t num_words, const float* mean, const float* variance,
                           const int32_t* channels, int32_t* codes, void* digest) {
  const int64_t num_channels = num_words * kCodesPerWord;
  T* means = static_cast<T*>(digest);
  T* steps = means + head_size;
  for (int64_t d = 0; d < head_size; ++d) write_one(means + d, mean[d]);
  for (int64_t r = 0; r < num_channels; ++r) {
    write_one(steps + r, kCodeStep * __builtin_sqrtf(variance[channels[r]]));
    write_one(steps + num_channels + r, static_cast<float>(channels[r]));
  }
  for (int64_t t = 0; t < num_tokens * num_words; ++t) codes[t] = 0;
  for (int64_t r = 0; r < num_channels; ++r) {
    const float middle = read_one(means + channels[r]), step = read_one(steps + r);
    // a channel without deviation has keys at its mean
    const float width = step > 0x1p-126f ? step : 0x1p-126f;
    const int shift = kCodeBits * static_cast<int>(r % kCodesPerWord);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const float key = read_one(static_cast<const T*>(keys[t]) + channels[r]);
      const float level = (key - middle) / width + 0.5f * (kMaxCode + 1.0f);
      // towards zero, which above zero is down; below it the code is zero in any case
      const float code = level > 0.0f ? (level < kMaxCode ? level : kMaxCode) : 0.0f;
      codes[t * num_words + r / kCodesPerWord] |=
          static_cast<int32_t>(static_cast<uint32_t>(code) << shift);
    }
  }
}

void encode_page(FloatType type, const void* const* keys, int64_t num_tokens, int64_t head_size,
                 int64_t num_words, const float* mean, const float* variance,
                 const int32_t* channels, int32_t* codes, void* digest) {
  BUDGETKV_FOR_FLOAT_TYPE(type, encode_page_as, keys, num_tokens, head_size, num_words, mean,
                          variance, channels, codes, digest);
}
