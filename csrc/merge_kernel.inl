// Cosines by the matrix product of score_kernel.inl, and weighted means of tokens. See merge.h.

template <class T>
static float token_norm_as(const char* token, int64_t head_size) {
  const T* elements = reinterpret_cast<const T*>(token);
  Vec squares = Vec{};
  for_each_vector(head_size, [&](int i, bool is_tail) {
    const Vec element = load(elements + i, is_tail);
    squares += element * element;
  });
  return __builtin_sqrtf(reduce_add(squares));
}

float token_norm(FloatType type, const char* token, int64_t head_size) {
  BUDGETKV_FOR_FLOAT_TYPE(type, token_norm_as, token, head_size);
}

// Writes the key divided by its norm, or zeros, to every `stride`-th number from `unit`.
template <class T>
static void write_unit(const char* key, int64_t head_size, float* unit, int64_t stride) {
  const float norm = token_norm_as<T>(key, head_size);
  const float inverse = norm > 0.0f ? 1.0f / norm : 0.0f;
  const T* elements = reinterpret_cast<const T*>(key);
  for_each_vector(head_size, [&](int i, bool is_tail) {
    const Vec element = load(elements + i, is_tail) * inverse;
    const int lanes = is_tail ? kTail : kLanes;
    for (int lane = 0; lane < lanes; ++lane) unit[(i + lane) * stride] = element[lane];
  });
}

template <class T>
static void find_pivots_as(const PivotTask& task) {
  const int64_t size = task.head_size;
  for (int64_t i = 0; i < task.num_kept; ++i) {
    const int64_t in_block = i % kBlockTokens;
    float* column = task.packed + (i - in_block) * size + in_block;
    write_unit<T>(task.keys + task.kept[i], size, column, kBlockTokens);
  }
  ScoreTask product = {};
  product.scale = 1.0f;
  product.head_size = size;
  for (int64_t first = 0; first < task.num_dropped; first += kRowTile) {
    const int64_t left = task.num_dropped - first, rows = left < kRowTile ? left : kRowTile;
    for (int64_t r = 0; r < rows; ++r) {
      write_unit<T>(task.keys + task.dropped[first + r], size, task.rows + r * size, 1);
      task.pivots[first + r] = 0;
      task.similarities[first + r] = -__builtin_inff();
    }
    for (int64_t block = 0; block < task.num_kept; block += kBlockTokens) {
      multiply(task.packed + block * size, task.rows, rows, product, task.cosines, kBlockTokens);
      const int64_t held = task.num_kept - block;
      const Segment segment = {held < kBlockTokens ? held : kBlockTokens};
      for (int64_t r = 0; r < rows; ++r) {
        float* cosines = task.cosines + r * kBlockTokens;
        const float highest = segment_max(cosines, segment);
        if (!(highest > task.similarities[first + r])) continue;  // an equal one came before
        int64_t at = 0;
        while (cosines[at] != highest) ++at;
        task.pivots[first + r] = block + at;
        task.similarities[first + r] = highest;
      }
    }
  }
}

void find_pivots(const PivotTask& task) {
  BUDGETKV_FOR_FLOAT_TYPE(task.type, find_pivots_as, task);
}

template <class T>
static void mix_as(const MixTask& task) {
  T* pivot = reinterpret_cast<T*>(task.field + task.pivot);
  for_each_vector(task.head_size, [&](int i, bool is_tail) {
    Vec sum = load(pivot + i, is_tail) * task.own_weight;
    for (int64_t s = 0; s < task.num_sources; ++s) {
      const T* source = reinterpret_cast<const T*>(task.field + task.sources[s]);
      sum += load(source + i, is_tail) * task.weights[s];
    }
    store(pivot + i, sum / task.total_weight, is_tail);
  });
}

void mix(const MixTask& task) { BUDGETKV_FOR_FLOAT_TYPE(task.type, mix_as, task); }
