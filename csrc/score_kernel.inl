// Probe attention: a small matrix product, softmax, and an exact top-k sum. See score.h.

template <class T>
static void pack_block_as(const PackTask& task) {
  const int64_t size = task.head_size;
  for (int64_t i = 0; i < task.num_tokens; ++i) {
    const int64_t token = task.first_token + i;
    const int64_t page_offset = task.table[token / task.page_tokens] * task.page_bytes;
    const int64_t token_offset = token % task.page_tokens * size;
    const T* key = reinterpret_cast<const T*>(task.keys + page_offset) + token_offset;
    const T* value = reinterpret_cast<const T*>(task.values + page_offset) + token_offset;
    Vec squares = Vec{};
    for_each_vector(size, [&](int channel, bool is_tail) {
      const Vec loaded = load(key + channel, is_tail);
      float* column = task.packed + channel * kBlockTokens + i;
      const int lanes = is_tail ? kTail : kLanes;
      for (int lane = 0; lane < lanes; ++lane) column[lane * kBlockTokens] = loaded[lane];
      const Vec element = load(value + channel, is_tail);
      squares += element * element;
    });
    task.norms[i] = __builtin_sqrtf(reduce_add(squares)) * task.value_unit;
  }
  for (int64_t channel = 0; channel < size; ++channel) {
    for (int64_t i = task.num_tokens; i < kBlockTokens; ++i) {
      task.packed[channel * kBlockTokens + i] = 0.0f;
    }
  }
}

void pack_block(const PackTask& task) { BUDGETKV_FOR_FLOAT_TYPE(task.type, pack_block_as, task); }

// Logits of kRows rows for one block. The sums stay in registers: 16 of 32 with AVX-512, 8 of 16
// with less.
template <int kRows>
static void multiply_block(const float* block, const float* queries, const ScoreTask& task,
                           float* logits, int64_t row_stride) {
  const int64_t head_size = task.head_size;
  constexpr int kVecs = kLanes == 16 ? 4 : 2;
  for (int64_t first = 0; first < kBlockTokens; first += kVecs * kLanes) {
    Vec sum[kRows][kVecs] = {};
    for (int64_t channel = 0; channel < head_size; ++channel) {
      const float* keys = block + channel * kBlockTokens + first;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const float query = queries[r * head_size + channel];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] += load(keys + v * kLanes) * query;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        Vec logit = sum[r][v] * task.scale;
        if (task.soft_cap != 0) logit = tanh(logit * (1.0f / task.soft_cap)) * task.soft_cap;
        store(logits + r * row_stride + first + v * kLanes, logit);
      }
    }
  }
}

static void multiply(const float* block, const float* queries, int64_t num_rows,
                     const ScoreTask& task, float* logits, int64_t row_stride) {
  int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4) {
    const float* four = queries + r * task.head_size;
    multiply_block<4>(block, four, task, logits + r * row_stride, row_stride);
  }
  queries += r * task.head_size;
  logits += r * row_stride;
  switch (num_rows - r) {
    case 3: return multiply_block<3>(block, queries, task, logits, row_stride);
    case 2: return multiply_block<2>(block, queries, task, logits, row_stride);
    case 1: return multiply_block<1>(block, queries, task, logits, row_stride);
  }
}

// The largest of a padded segment's logits, -inf of an empty one. Mutates: -inf in the padding.
static float segment_max(float* logits, Segment segment) {
  const float infinity = __builtin_inff();
  for (int64_t i = segment.num_tokens; i < segment.padded(); ++i) logits[i] = -infinity;
  Vec most = splat(-infinity);
  for (int64_t i = 0; i < segment.padded(); i += kLanes) most = max(most, load(logits + i));
  return reduce_max(most);
}

// Turns logits into weights 2^(logit - highest) in place; returns their sum. Padding becomes 0.
static float weigh(float* logits, Segment segment, float highest) {
  Vec sum = Vec{};
  for (int64_t i = 0; i < segment.padded(); i += kLanes) {
    const Vec weight = exp2(load(logits + i) - highest);
    store(logits + i, weight);
    sum += weight;
  }
  return reduce_add(sum);
}

static void add_scaled(float* mass, const float* weights, Segment segment, float factor) {
  for (int64_t i = 0; i < segment.padded(); i += kLanes) {
    store(mass + i, load(mass + i) + load(weights + i) * factor);
  }
}

static void raise_to_scaled(float* mass, const float* weights, Segment segment, float factor) {
  for (int64_t i = 0; i < segment.padded(); i += kLanes) {
    store(mass + i, max(load(mass + i), load(weights + i) * factor));
  }
}

// How many weights reach a threshold, which is the bits of one: floats from 0 to 1 order as they
// do.
static int64_t count_reaching(const float* weights, Segment segment, int32_t threshold) {
  Int hits = Int{};
  for (int64_t i = 0; i < segment.padded(); i += kLanes) {
    hits -= bitcast<Int>(load(weights + i)) >= threshold;
  }
  int64_t reached = 0;
  for (int lane = 0; lane < kLanes; ++lane) reached += hits[lane];
  return reached;
}

// Sum of the `count` largest weights, exact: a search for the bits of a threshold that splits them
// off, or of the two between which they tie. It starts from `guess`, the threshold of the row
// before, and leaves its own there; it steps away until it has a threshold on both sides, then
// goes where a straight line through their counts hits `count`, and to the middle in turn.
static float top_sum(const float* weights, Segment segment, int64_t count, int32_t* guess) {
  int32_t low = 0, high = bitcast<int32_t>(1.0f) + 1;  // at least, and fewer than, `count` reach it
  int64_t above_low = segment.padded(), above_high = 0;
  bool has_low = false, has_high = false;
  int32_t tried = *guess > low && *guess < high ? *guess : high - 1, step = 1 << 19;
  int64_t reached = count_reaching(weights, segment, tried);
  for (bool halves = false; reached != count; halves = !halves) {
    if (reached > count) {
      low = tried, above_low = reached, has_low = true;
    } else {
      high = tried, above_high = reached, has_high = true;
    }
    const int64_t gap = int64_t{high} - low;
    if (gap <= 1) break;
    int64_t next = low + gap / 2;
    if (!(has_low && has_high) && gap > 2 * int64_t{step}) {
      next = has_low ? low + int64_t{step} : high - int64_t{step};
      step = step < 1 << 26 ? step * 4 : step;
    } else if (!halves) {
      next = low + gap * (above_low - count) / (above_low - above_high);
    }
    tried = static_cast<int32_t>(next <= low ? low + 1 : next >= high ? high - 1 : next);
    reached = count_reaching(weights, segment, tried);
  }
  const int32_t threshold = reached == count ? tried : high;
  *guess = threshold;
  Vec sum = Vec{};
  for (int64_t i = 0; i < segment.padded(); i += kLanes) {
    const Vec weight = load(weights + i);
    sum += select(bitcast<Int>(weight) >= threshold, weight, Vec{});
  }
  const int64_t taken = reached == count ? count : above_high;
  // what is missing ties at the weight just below the threshold
  return reduce_add(sum) + static_cast<float>(count - taken) * bitcast<float>(low);
}

// Takes one row's probabilities into `mass`; returns its top-k mass.
static float score_row(const ScoreTask& task, float* logits, int32_t* guess) {
  const Segment sinks = task.sinks, rest = task.rest;
  float *rest_logits = logits + sinks.padded(), *rest_mass = task.mass + sinks.padded();
  // each segment has a maximum of its own: next to strong sinks the rest would vanish
  const float sink_max = segment_max(logits, sinks), rest_max = segment_max(rest_logits, rest);
  const float highest = sink_max > rest_max ? sink_max : rest_max;
  const float sink_sum = weigh(logits, sinks, sink_max);
  const float rest_sum = weigh(rest_logits, rest, rest_max);
  // beyond the bound, what the tokens have vanishes beside the learned sink in any case
  constexpr float kMostAbove = 120.0f;
  const float above = task.sink - highest;
  const Vec gaps =
      exp2(Vec{sink_max - highest, rest_max - highest, above < kMostAbove ? above : kMostAbove});
  const float total = sink_sum * gaps[0] + rest_sum * gaps[1] + gaps[2];
  const auto take = task.takes_largest ? raise_to_scaled : add_scaled;
  take(task.mass, logits, sinks, gaps[0] / total);
  take(rest_mass, rest_logits, rest, gaps[1] / total);
  if (rest.num_tokens <= task.top_k) return 1.0f;
  return top_sum(rest_logits, rest, task.top_k, guess) / rest_sum;
}

float score_rows(const ScoreTask& task) {
  const int64_t padded = task.sinks.padded() + task.rest.padded();
  float topk_mass = 0.0f;
  int32_t guess = 0;
  for (int64_t first = 0; first < task.num_rows; first += kRowTile) {
    const int64_t left = task.num_rows - first, rows = left < kRowTile ? left : kRowTile;
    const float* queries = task.queries + first * task.head_size;
    for (int64_t slot = 0; slot < padded; slot += kBlockTokens) {
      multiply(task.packed + slot * task.head_size, queries, rows, task, task.logits + slot,
               padded);
    }
    for (int64_t r = 0; r < rows; ++r) {
      topk_mass += score_row(task, task.logits + r * padded, &guess);
    }
  }
  return topk_mass;
}
