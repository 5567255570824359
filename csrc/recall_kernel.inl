// Codes of 2 bits: logits of queries from them, and the codes of keys. See recall.h.

constexpr int kVectorsPerWord = static_cast<int>(kCodesPerWord) / kLanes;
constexpr int kMaxCodeWords = 256 / static_cast<int>(kCodesPerWord);

// The codes of kLanes channels of a word, from channel `part * kLanes` of it on, as floats.
BUDGETKV_INLINE Vec unpack_codes(int32_t word, int part) {
  const Uint shift = bitcast<Uint>(lane_index() * 2 + 2 * kLanes * part);
  const Uint codes = ((Uint{} + static_cast<uint32_t>(word)) >> shift) & 3;
  return __builtin_convertvector(bitcast<Int>(codes), Vec);
}

// q.k = scale q.m + sum_d a_d (code_d - 1.5) with a_d = scale q_d s_d: writes the a, then the rest.
template <class T>
static void prepare_queries(const IndexQuery& query, const void* digest, float* scratch) {
  const int64_t size = query.head_size, width = query.num_words * kCodesPerWord;
  const T* mean = static_cast<const T*>(digest);
  const T* step = mean + size;
  for (int64_t g = 0; g < query.num_queries; ++g) {
    const float* q = query.queries + g * size;
    float* factors = scratch + g * width;
    Vec base = Vec{};
    for_each_vector(size, [&](int i, bool is_tail) {
      const Vec channel = load(q + i, is_tail) * query.scale;
      const Vec factor = channel * load(step + i, is_tail);
      base += channel * load(mean + i, is_tail) - factor * 1.5f;
      store(factors + i, factor, is_tail);
    });
    for (int64_t d = size; d < width; ++d) factors[d] = 0.0f;
    scratch[query.num_queries * width + g] = reduce_add(base);
  }
}

static void prepare(const IndexQuery& query, const void* digest, float* scratch) {
  BUDGETKV_FOR_FLOAT_TYPE(query.type, prepare_queries, query, digest, scratch);
}

void index_logits(const IndexQuery& query, const int32_t* codes, const void* digest,
                  int64_t num_tokens, float* scratch, float* logits, int64_t stride) {
  prepare(query, digest, scratch);
  const int64_t words = query.num_words, width = words * kCodesPerWord;
  const float* bases = scratch + query.num_queries * width;
  Vec unpacked[kLanes * kMaxCodeWords * kVectorsPerWord];
  for (int64_t first = 0; first < num_tokens; first += kLanes) {
    const int64_t count = num_tokens - first < kLanes ? num_tokens - first : kLanes;
    Vec* next = unpacked;
    for (int64_t t = 0; t < kLanes; ++t) {
      // behind the last token stands what is never stored
      const int32_t* token = codes + (first + (t < count ? t : 0)) * words;
      for (int64_t w = 0; w < words; ++w) {
        for (int part = 0; part < kVectorsPerWord; ++part) *next++ = unpack_codes(token[w], part);
      }
    }
    const int64_t vectors = words * kVectorsPerWord;
    for (int64_t g = 0; g < query.num_queries; ++g) {
      const float* factors = scratch + g * width;
      Vec rows[kLanes];
      for (int t = 0; t < kLanes; ++t) {
        Vec sum = Vec{};
        const Vec* token = unpacked + t * vectors;
        for (int64_t v = 0; v < vectors; ++v) sum += token[v] * load(factors + v * kLanes);
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
static void encode_page_as(const void* const* keys, int64_t num_tokens, int64_t head_size,
                           int64_t num_words, int32_t* codes, void* digest) {
  T* means = static_cast<T*>(digest);
  T* steps = means + head_size;
  for_each_vector(head_size, [&](int channel, bool is_tail) {
    const auto key = [&](int64_t t) {
      return load(static_cast<const T*>(keys[t]) + channel, is_tail);
    };
    Vec sum = Vec{};
    for (int64_t t = 0; t < num_tokens; ++t) sum += key(t);
    Vec mean = sum / static_cast<float>(num_tokens);
    Vec squares = Vec{};
    for (int64_t t = 0; t < num_tokens; ++t) squares += (key(t) - mean) * (key(t) - mean);
    Vec step = squares / static_cast<float>(num_tokens);
    for (int i = 0; i < kLanes; ++i) step[i] = kCodeStep * __builtin_sqrtf(step[i]);
    store(means + channel, mean, is_tail);
    store(steps + channel, step, is_tail);
  });
  for (int64_t t = 0; t < num_tokens * num_words; ++t) codes[t] = 0;
  for_each_vector(head_size, [&](int channel, bool is_tail) {
    const Vec mean = load(means + channel, is_tail);
    // a channel without deviation has keys at its mean
    const Vec step = max(load(steps + channel, is_tail), splat(0x1p-126f));
    const int64_t word = channel / kCodesPerWord;
    const int lanes = is_tail && kLanes > kTail ? kTail : kLanes;
    for (int64_t t = 0; t < num_tokens; ++t) {
      const Vec level =
          (load(static_cast<const T*>(keys[t]) + channel, is_tail) - mean) / step + 2.0f;
      // towards zero, which above zero is down, and below it zero in any case
      const Int code = __builtin_convertvector(min(max(level, splat(0.0f)), splat(3.0f)), Int);
      uint32_t packed = 0;
      for (int i = 0; i < lanes; ++i) {
        packed |= static_cast<uint32_t>(code[i]) << (2 * (channel % kCodesPerWord + i));
      }
      codes[t * num_words + word] |= static_cast<int32_t>(packed);
    }
  });
}

void encode_page(FloatType type, const void* const* keys, int64_t num_tokens, int64_t head_size,
                 int64_t num_words, int32_t* codes, void* digest) {
  BUDGETKV_FOR_FLOAT_TYPE(type, encode_page_as, keys, num_tokens, head_size, num_words, codes,
                          digest);
}
