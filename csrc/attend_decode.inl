// Decode: one token, so too few queries to fill the lanes of a vector; the lanes are elements of
// the head instead. Keys and values are read once, in place, for all query heads of the group.

constexpr int kMaxPaddedGroup = kMaxDecodeGroup;  // groups of 1, 2 or a multiple of 4 queries

int64_t decode_scratch_floats(int head_size) {
  const int64_t padded_size = (head_size + kLanes - 1) / kLanes * kLanes;
  return kMaxPaddedGroup * (2 * padded_size + kBlockKeys);
}

// scores [kQ, kBlockKeys] of kQ queries [kQ, padded]; the block is padded to whole steps. The
// first queries of a block fetch the next block for all.
template <class T, int kQ>
BUDGETKV_INLINE void score_keys(const Block<T>& block, const Block<T>& next, bool is_first,
                                const float* queries, int size, int padded, float* scores) {
  constexpr int kStep = kLanes / kQ;  // so that kLanes sums fill the registers
  for (int key = 0; key < block.num_keys; key += kStep) {
    if (is_first) prefetch(next, key, kStep, size);
    Vec sums[kLanes] = {};
    for_each_vector(size, [&](int d, bool is_tail) {
      Vec k[kStep];
#pragma GCC unroll 16
      for (int i = 0; i < kStep; ++i) k[i] = load(block.keys[key + i] + d, is_tail);
#pragma GCC unroll 4
      for (int q = 0; q < kQ; ++q) {
        const Vec query = load(queries + q * padded + d);
#pragma GCC unroll 16
        for (int i = 0; i < kStep; ++i) sums[q * kStep + i] += query * k[i];
      }
    });
    const Vec sum = reduce_each(sums);
    for (int q = 0; q < kQ; ++q) {
      __builtin_memcpy(scores + q * kBlockKeys + key,
                       reinterpret_cast<const float*>(&sum) + q * kStep, kStep * sizeof(float));
    }
  }
}

// sums [kQ, padded] = sums * decay + P V, for kV vectors from element d on.
template <class T, int kQ, int kV>
BUDGETKV_INLINE void add_values(const T* const* v_rows, int num_keys, int d, bool is_tail,
                                const float* weights, const float* decay, int padded, float* sums) {
  Vec acc[kQ][kV];
#pragma GCC unroll 4
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) acc[q][v] = load(sums + q * padded + d + v * kLanes) * decay[q];
  }
  for (int key = 0; key < num_keys; ++key) {
    Vec value[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) value[v] = load(v_rows[key] + d + v * kLanes, is_tail);
#pragma GCC unroll 4
    for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) acc[q][v] += weights[q * kBlockKeys + key] * value[v];
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) store(sums + q * padded + d + v * kLanes, acc[q][v]);
  }
}

template <class T, int kQ>
BUDGETKV_INLINE void weigh_values(const T* const* v_rows, int num_keys, int size,
                                  const float* weights, const float* decay, int padded,
                                  float* sums) {
  constexpr int kV = kLanes == 16 ? 4 : 2;
  int d = 0;
  for (; d + kV * kLanes <= size; d += kV * kLanes) {
    add_values<T, kQ, kV>(v_rows, num_keys, d, false, weights, decay, padded, sums);
  }
  for (; d + kLanes <= size; d += kLanes) {
    add_values<T, kQ, 1>(v_rows, num_keys, d, false, weights, decay, padded, sums);
  }
  if (d < size) add_values<T, kQ, 1>(v_rows, num_keys, d, true, weights, decay, padded, sums);
}

// The scores [kBlockKeys] of one query become weights; returns the factor for what came before.
BUDGETKV_INLINE float soften_row(float* scores, int num_keys, float& peak, float& total) {
  for (int key = num_keys; key % kLanes; ++key) scores[key] = -kInfinity;
  Vec high = splat(peak);
  for (int key = 0; key < num_keys; key += kLanes) high = max(high, load(scores + key));
  const float higher = reduce_max(high);
  Vec sum = {};
  for (int key = 0; key < num_keys; key += kLanes) {
    const Vec weight = exp(load(scores + key) - higher);
    store(scores + key, weight);
    sum += weight;
  }
  const float decay = exp(splat(peak - higher))[0];
  peak = higher;
  total = total * decay + reduce_add(sum);
  return decay;
}

template <class T, int kQ>
bool decode_group(const AttendArgs& args, const AttendTile& tile, int begin, int end,
                  const Partial& result, float* scratch) {
  const int size = args.head_size;
  const int padded = (size + kLanes - 1) / kLanes * kLanes;
  const int num_padded = (tile.num_queries + kQ - 1) / kQ * kQ;
  float* queries = scratch;
  float* sums = queries + num_padded * padded;
  float* scores = sums + num_padded * padded;
  __builtin_memset(scratch, 0, 2 * num_padded * padded * sizeof(float));
  for (int q = 0; q < tile.num_queries; ++q) {
    read_query(args, tile, q, queries + q * padded);
  }
  float peak[kMaxPaddedGroup], total[kMaxPaddedGroup] = {}, decay[kMaxPaddedGroup];
  for (float& value : peak) value = -kInfinity;

  Block<T> blocks[2];
  if (!find_block(args, tile, begin, end, blocks[0])) return false;
  for (int first = begin, turn = 0; first < end; first += kBlockKeys, turn ^= 1) {
    Block<T>&block = blocks[turn], &next = blocks[turn ^ 1];
    if (!find_block(args, tile, first + kBlockKeys, end, next)) return false;
    const int num_keys = block.num_keys;
    for (int key = num_keys; key % kLanes; ++key) block.keys[key] = block.keys[num_keys - 1];
    for (int q = 0; q < num_padded; q += kQ) {
      float* scores_q = scores + q * kBlockKeys;
      score_keys<T, kQ>(block, next, q == 0, queries + q * padded, size, padded, scores_q);
      for (int i = 0; i < kQ; ++i) {
        const int vectors = (num_keys + kLanes - 1) / kLanes;
        cap_scores(args, scores_q + i * kBlockKeys, kLanes, vectors);
        decay[q + i] = soften_row(scores_q + i * kBlockKeys, num_keys, peak[q + i], total[q + i]);
      }
      weigh_values<T, kQ>(block.values, num_keys, size, scores_q, decay + q, padded,
                          sums + q * padded);
    }
  }

  for (int q = 0; q < tile.num_queries; ++q) {
    __builtin_memcpy(result.sum + q * size, sums + q * padded, size * sizeof(float));
    result.peak[q] = peak[q];
    result.total[q] = total[q];
  }
  return true;
}

template <class T>
BUDGETKV_INLINE bool decode(const AttendArgs& args, const AttendTile& tile, int begin, int end,
                            const Partial& result, float* scratch) {
  switch (tile.num_queries) {
    case 1: return decode_group<T, 1>(args, tile, begin, end, result, scratch);
    case 2: return decode_group<T, 2>(args, tile, begin, end, result, scratch);
    default: return decode_group<T, 4>(args, tile, begin, end, result, scratch);
  }
}
