// Prefill: the lanes of a vector are queries, and keys and values are read one number at a time.
//
// So K needs no transposition and softmax no reduction across lanes: scores are S^T = K Q^T, the
// output is O^T += V^T P^T, and only Q and O are transposed, once per tile. float32 pages are read
// in place; narrower ones are widened into scratch, a block at a time.

// Registers: kRegisterRows x 3 sums, 3 operands and one broadcast.
constexpr int kRegisterRows = kLanes == 16 ? 8 : 4;
constexpr int kTileVectors = 3;
constexpr int kSumElements = 128;  // longer running sums would lose accuracy
constexpr int kTileQueries = kTileVectors * kLanes;

int64_t prefill_scratch_floats(int head_size) {
  return int64_t{2} * head_size * kTileQueries + kBlockKeys * (kTileQueries + 2 * head_size);
}

// Q^T [D, kV * kLanes] from the tile's rows; lanes without a query are zero.
template <int kV>
BUDGETKV_INLINE void transpose_queries(const AttendArgs& args, const AttendTile& tile, float* q_t) {
  constexpr int kWidth = kV * kLanes;
  float row[kMaxHeadSize];
  for (int q = 0; q < kWidth; ++q) {
    if (q < tile.num_queries) read_query(args, tile, q, row);
    for (int d = 0; d < args.head_size; ++d) {
      q_t[d * kWidth + q] = q < tile.num_queries ? row[d] : 0.0f;
    }
  }
}

// Rows of float32: the pages themselves, or a widened copy.
BUDGETKV_INLINE void widen_rows(const float* const* rows, int count, int, float*,
                                const float** wide) {
  for (int i = 0; i < count; ++i) wide[i] = rows[i];
}
template <class T>
BUDGETKV_INLINE void widen_rows(const T* const* rows, int count, int size, float* copy,
                                const float** wide) {
  for (int i = 0; i < count; ++i, copy += size) {
    for_each_vector(
        size, [&](int d, bool is_tail) { store(copy + d, load(rows[i] + d, is_tail), is_tail); });
    wide[i] = copy;
  }
}

// scores [kRegisterRows, kV * kLanes] (+)= K Q^T over the head elements [begin, end).
template <int kV>
BUDGETKV_INLINE void multiply_keys(const float* const* k_rows, const float* q_t, int begin, int end,
                                   float* scores) {
  constexpr int kWidth = kV * kLanes;
  Vec sums[kRegisterRows][kV] = {};
  for (int d = begin; d < end; ++d) {
    Vec q[kV];
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) q[v] = load(q_t + d * kWidth + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRegisterRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) sums[r][v] += k_rows[r][d] * q[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRegisterRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) {
      float* at = scores + r * kWidth + v * kLanes;
      store(at, begin > 0 ? load(at) + sums[r][v] : sums[r][v]);
    }
  }
}

// o_t [kRegisterRows, kV * kLanes] = o_t * decay + V^T P^T, for the head elements [d, d + rows).
template <int kV>
BUDGETKV_INLINE void multiply_values(const float* const* v_rows, int d, const float* weights,
                                     int num_keys, const Vec* decay, float* o_t) {
  constexpr int kWidth = kV * kLanes;
  Vec sums[kRegisterRows][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kRegisterRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) sums[r][v] = load(o_t + r * kWidth + v * kLanes) * decay[v];
  }
  for (int key = 0; key < num_keys; ++key) {
    const float* value = v_rows[key] + d;
    Vec p[kV];
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) p[v] = load(weights + key * kWidth + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRegisterRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) sums[r][v] += value[r] * p[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRegisterRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) store(o_t + r * kWidth + v * kLanes, sums[r][v]);
  }
}

template <class T, int kV>
bool prefill(const AttendArgs& args, const AttendTile& tile, int begin, int end,
             const Partial& result, float* scratch) {
  constexpr int kWidth = kV * kLanes;
  const int size = args.head_size;
  float* q_t = scratch;
  float* o_t = q_t + size * kWidth;
  float* scores = o_t + size * kWidth;
  float* k_copy = scores + kBlockKeys * kWidth;
  float* v_copy = k_copy + kBlockKeys * size;
  transpose_queries<kV>(args, tile, q_t);
  __builtin_memset(o_t, 0, size * kWidth * sizeof(float));
  Vec peak[kV], total[kV], decay[kV];
  Int visible[kV];
  for (int v = 0; v < kV; ++v) {
    peak[v] = splat(-kInfinity);
    total[v] = Vec{};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int query = v * kLanes + lane;
      visible[v][lane] = tile.visible(query < tile.num_queries ? query : 0, args.group);
    }
  }

  Block<T> blocks[2];
  if (!find_block(args, tile, begin, end, blocks[0])) return false;
  for (int first = begin, turn = 0; first < end; first += kBlockKeys, turn ^= 1) {
    const Block<T>&block = blocks[turn], &next = blocks[turn ^ 1];
    if (!find_block(args, tile, first + kBlockKeys, end, blocks[turn ^ 1])) return false;
    const int num_keys = block.num_keys;
    const float *k_rows[kBlockKeys], *v_rows[kBlockKeys];
    widen_rows(block.keys, num_keys, size, k_copy, k_rows);
    widen_rows(block.values, num_keys, size, v_copy, v_rows);
    for (int key = num_keys; key % kRegisterRows; ++key) k_rows[key] = kZeroRow;

    for (int key = 0; key < num_keys; key += kRegisterRows) {
      prefetch(next, key, kRegisterRows, size);
      for (int d = 0; d < size; d += kSumElements) {
        const int d_end = size < d + kSumElements ? size : d + kSumElements;
        multiply_keys<kV>(k_rows + key, q_t, d, d_end, scores + key * kWidth);
      }
    }
    const bool is_masked = first + num_keys > tile.visible(0, args.group);
    for (int v = 0; v < kV; ++v) {
      cap_scores(args, scores + v * kLanes, kWidth, num_keys);
      for (int key = 0; is_masked && key < num_keys; ++key) {
        float* at = scores + key * kWidth + v * kLanes;
        store(at, select(Int{} + first + key < visible[v], load(at), splat(-kInfinity)));
      }
      decay[v] = soften(scores + v * kLanes, kWidth, num_keys, peak[v], total[v]);
    }
    for (int d = 0; d < size; d += kRegisterRows) {
      multiply_values<kV>(v_rows, d, scores, num_keys, decay, o_t + d * kWidth);
    }
  }

  for (int q = 0; q < tile.num_queries; ++q) {
    for (int d = 0; d < size; ++d) result.sum[q * size + d] = o_t[d * kWidth + q];
    result.peak[q] = peak[q / kLanes][q % kLanes];
    result.total[q] = total[q / kLanes][q % kLanes];
  }
  return true;
}
