// Prefill of bfloat16 on the matrix unit: 16 x 16 sums of products over 32 elements at a time.
//
// Scores are S^T = K Q^T, so that the lanes of softmax are queries, as in attend_prefill.inl: rows
// of K are read in place, Q is packed once per tile. The output is O += P V: the weights of a block
// are rounded to bfloat16, as torch rounds them, and transposed; rows of V are laced in pairs.

constexpr int kSide = 16;               // rows of a matrix, and its 32-bit columns
constexpr int kDepth = 32;              // bfloat16 elements of a row
constexpr int kMatrix = kSide * kSide;  // 32-bit words of a matrix
constexpr int kTileQueries = 128;
constexpr int kQueryMatrices = kTileQueries / kSide;
constexpr int kKeyMatrices = kBlockKeys / kSide;
constexpr int kKeyChunks = kBlockKeys / kDepth;
constexpr int kRowBytes = 64;

BUDGETKV_INLINE int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// Tiles are loaded and stored behind the compiler's back.
BUDGETKV_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

// All eight tiles are full matrices.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kTileShapes;

// 0, 16, 1, 17, ...: from 16 even and 16 odd numbers to pairs.
alignas(64) constexpr uint16_t kLaced[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// Scratch of one split. Sizes in 32-bit words.
struct Workspace {
  int depths, columns;  // chunks of 32 and matrices of 16 head elements
  int64_t num_words = 0;
  uint32_t *queries, *weights, *keys, *values;
  float *scores, *sums;
  // Without `base` it only counts its words.
  Workspace(float* base, int head_size)
      : depths((head_size + kDepth - 1) / kDepth), columns((head_size + kSide - 1) / kSide) {
    const auto take = [&](int64_t words) {
      float* at = base == nullptr ? nullptr : base + num_words;
      num_words += words;
      return at;
    };
    const auto take_packed = [&](int64_t words) {
      return reinterpret_cast<uint32_t*>(take(words));
    };
    queries = take_packed(int64_t{depths} * kQueryMatrices * kMatrix);  // [depths, query matrices]
    weights = take_packed(kKeyChunks * kQueryMatrices * kMatrix);   // [key chunks, query matrices]
    keys = take_packed(int64_t{kBlockKeys} * depths * kSide);       // [kBlockKeys, depths * 32]
    values = take_packed(int64_t{kKeyChunks} * columns * kMatrix);  // [key chunks, columns]
    scores = take(kBlockKeys * kTileQueries);                       // [kBlockKeys, kTileQueries]
    sums = take(int64_t{kTileQueries} * columns * kSide);           // [kTileQueries, columns * 16]
  }
};

// Q^T as pairs of elements: row r of a matrix has elements 2 r and 2 r + 1 of its 16 queries.
BUDGETKV_INLINE void pack_queries(const AttendArgs& args, const AttendTile& tile,
                                  const Workspace& work) {
  const int pairs = args.head_size / 2, padded_pairs = work.depths * kSide;
  for (int q = 0; q < kTileQueries; ++q) {
    const char* from = q < tile.num_queries ? static_cast<const char*>(args.query) +
                                                  2 * place_of_query(args, tile, q)
                                            : nullptr;
    for (int pair = 0; pair < padded_pairs; ++pair) {
      uint32_t word = 0;
      if (from != nullptr && pair < pairs) __builtin_memcpy(&word, from + 4 * pair, 4);
      const int matrix = pair / kSide * kQueryMatrices + q / kSide;
      work.queries[matrix * kMatrix + pair % kSide * kSide + q % kSide] = word;
    }
  }
}

struct Rows {
  const void* data;
  int64_t stride_bytes;
};

// 16 rows of keys: in place if they follow each other, else a copy with zeros around.
BUDGETKV_INLINE Rows rows_of_keys(const Block<Bf16>& block, int first, int size,
                                  const Workspace& work) {
  const int last = first + kSide - 1;
  if (size % kDepth == 0 && last < block.num_keys &&
      block.keys[last] == block.keys[first] + (kSide - 1) * size) {
    return {block.keys[first], size * int64_t{2}};
  }
  const int row_words = work.depths * kSide;
  uint32_t* copy = work.keys + first * row_words;
  __builtin_memset(copy, 0, kSide * row_words * 4);
  for (int i = 0; i < kSide && first + i < block.num_keys; ++i) {
    __builtin_memcpy(copy + i * row_words, block.keys[first + i], size * 2);
  }
  return {copy, row_words * int64_t{4}};
}

// scores [keys, kTileQueries] = K Q^T, two matrices of keys by two of queries at a time.
// Fetches `next` meanwhile.
BUDGETKV_INLINE void multiply_keys(const Block<Bf16>& block, const Block<Bf16>& next, int size,
                                   int query_matrices, const Workspace& work) {
  constexpr int64_t kScoreBytes = kTileQueries * sizeof(float);
  for (int key = 0; key < block.num_keys; key += 2 * kSide) {
    const Rows upper = rows_of_keys(block, key, size, work);
    const Rows lower = rows_of_keys(block, key + kSide, size, work);
    const char *up = static_cast<const char*>(upper.data),
               *low = static_cast<const char*>(lower.data);
    settle_memory();
    prefetch(next, key, 2 * kSide, size);
    for (int q = 0; q < query_matrices; q += 2) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int depth = 0; depth < work.depths; ++depth) {
        const uint32_t* queries = work.queries + (depth * kQueryMatrices + q) * kMatrix;
        _tile_loadd(4, up + depth * kRowBytes, upper.stride_bytes);
        _tile_loadd(5, low + depth * kRowBytes, lower.stride_bytes);
        _tile_loadd(6, queries, kRowBytes);
        _tile_loadd(7, queries + kMatrix, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* at = work.scores + key * kTileQueries + q * kSide;
      _tile_stored(0, at, kScoreBytes);
      _tile_stored(1, at + kSide, kScoreBytes);
      _tile_stored(2, at + kSide * kTileQueries, kScoreBytes);
      _tile_stored(3, at + kSide * kTileQueries + kSide, kScoreBytes);
    }
    settle_memory();
  }
}

// Pairs of bfloat16, `even` in the low halves.
BUDGETKV_INLINE __m512i lace(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Transposes 16 x 16 words: pairs, then fours of rows, then 128-bit lanes.
BUDGETKV_INLINE void transpose(__m512i* r) {
  __m512i t[kSide];
#pragma GCC unroll 8
  for (int i = 0; i < kSide; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSide; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 2^x, and 0 below 2^-126. Minimax polynomial of degree 3 on [-0.5, 0.5]: its relative error of
// 1e-4 is a twentieth of what rounding a weight to bfloat16 adds.
BUDGETKV_INLINE Vec raise(Vec x) {
  const __mmask16 is_normal = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = x - whole;
  Vec p = splat(5.500894412398338e-2f);
  p = p * f + 2.422109693288803e-1f;
  p = p * f + 6.932829022407532e-1f;
  p = p * f + 1.0f;
  return _mm512_maskz_scalef_ps(is_normal, p, whole);
}

// What `soften` does, of scores that are still to be multiplied by `scale`, which is not negative.
BUDGETKV_INLINE Vec soften_scaled(float* scores, int num_keys, float scale, Vec& peak, Vec& total) {
  constexpr float kLog2E = 1.44269504f;
  Vec most[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
  for (int key = 0; key < num_keys; ++key) {
    most[key % 4] = _mm512_max_ps(most[key % 4], load(scores + key * kTileQueries));
  }
  most[0] = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
  const Vec higher = _mm512_max_ps(most[0] * scale, peak);
  // A query that has seen no key yet has the peak -inf: subtract 0 instead, to get weights of 0.
  const Vec shift = select(higher == -kInfinity, Vec{}, higher) * kLog2E;
  const Vec decay = raise(peak * kLog2E - shift);
  Vec sums[2] = {};
  for (int key = 0; key < num_keys; ++key) {
    const Vec weight = raise(load(scores + key * kTileQueries) * (scale * kLog2E) - shift);
    store(scores + key * kTileQueries, weight);
    sums[key % 2] += weight;
  }
  peak = higher;
  total = total * decay + (sums[0] + sums[1]);
  return decay;
}

// The weights of 32 keys and 16 queries as a matrix of queries: rows of 32 bfloat16.
BUDGETKV_INLINE void pack_weights(int chunk, int query_matrix, const Workspace& work) {
  const float* from = work.scores + chunk * kDepth * kTileQueries + query_matrix * kSide;
  const __m512i laced = _mm512_load_si512(kLaced);
  __m512i rows[kSide];
#pragma GCC unroll 16
  for (int pair = 0; pair < kSide; ++pair, from += 2 * kTileQueries) {
    const auto halves = _mm512_cvtne2ps_pbh(load(from + kTileQueries), load(from));
    rows[pair] = _mm512_permutexvar_epi16(laced, bitcast<__m512i>(halves));
  }
  transpose(rows);
  uint32_t* to = work.weights + (chunk * kQueryMatrices + query_matrix) * kMatrix;
#pragma GCC unroll 16
  for (int row = 0; row < kSide; ++row) _mm512_store_si512(to + row * kSide, rows[row]);
}

// V as pairs of keys; zeros behind the last key, where the pool may hold anything.
BUDGETKV_INLINE void pack_values(const Block<Bf16>& block, int num_chunks, int size,
                                 const Workspace& work) {
  for (int pair = 0; pair < num_chunks * kSide; ++pair) {
    const bool has_even = 2 * pair < block.num_keys, has_odd = 2 * pair + 1 < block.num_keys;
    const Bf16* even = block.values[has_even ? 2 * pair : 0];
    const Bf16* odd = block.values[has_odd ? 2 * pair + 1 : 0];
    uint32_t* to = work.values + pair / kSide * work.columns * kMatrix + pair % kSide * kSide;
    for (int d = 0; d < size; d += kSide, to += kMatrix) {
      const __mmask16 in_row = size - d < kSide ? 0xff : 0xffff;
      const __m256i evens = _mm256_maskz_loadu_epi16(has_even ? in_row : 0, even + d);
      const __m256i odds = _mm256_maskz_loadu_epi16(has_odd ? in_row : 0, odd + d);
      _mm512_store_si512(to, lace(evens, odds));
    }
  }
}

// sums [kTileQueries, columns * 16] += P V.
BUDGETKV_INLINE void multiply_values(int num_chunks, int query_matrices, const Workspace& work) {
  const int width = work.columns * kSide;
  const int64_t bytes = width * sizeof(float);
  settle_memory();
  for (int q = 0; q < query_matrices; q += 2) {
    for (int column = 0; column < work.columns; column += 2) {
      // an odd last column is done twice, into a tile that is not stored
      const bool has_right = column + 1 < work.columns;
      float* at = work.sums + q * kSide * width + column * kSide;
      _tile_loadd(0, at, bytes);
      _tile_loadd(2, at + kSide * width, bytes);
      if (has_right) {
        _tile_loadd(1, at + kSide, bytes);
        _tile_loadd(3, at + kSide * width + kSide, bytes);
      }
      for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const uint32_t* weights = work.weights + (chunk * kQueryMatrices + q) * kMatrix;
        const uint32_t* values = work.values + (chunk * work.columns + column) * kMatrix;
        _tile_loadd(4, weights, kRowBytes);
        _tile_loadd(5, weights + kMatrix, kRowBytes);
        _tile_loadd(6, values, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (has_right) {
          _tile_loadd(7, values + kMatrix, kRowBytes);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, at, bytes);
      _tile_stored(2, at + kSide * width, bytes);
      if (has_right) {
        _tile_stored(1, at + kSide, bytes);
        _tile_stored(3, at + kSide * width + kSide, bytes);
      }
    }
  }
  settle_memory();
}

// Lets what was summed before shrink as the peaks rise.
BUDGETKV_INLINE void shrink_sums(const Vec* decay, int query_matrices, const Workspace& work) {
  const int width = work.columns * kSide;
  for (int q = 0; q < query_matrices * kSide; ++q) {
    const float factor = decay[q / kLanes][q % kLanes];
    if (factor == 1.0f) continue;
    float* row = work.sums + q * width;
    for (int d = 0; d < width; d += kLanes) store(row + d, load(row + d) * factor);
  }
}

BUDGETKV_INLINE bool prefill(const AttendArgs& args, const AttendTile& tile, int begin, int end,
                             const Partial& result, const Workspace& work) {
  const int size = args.head_size, width = work.columns * kSide;
  const int query_matrices = round_up(tile.num_queries, 2 * kSide) / kSide;
  pack_queries(args, tile, work);
  __builtin_memset(work.sums, 0, kTileQueries * width * sizeof(float));
  Vec peak[kQueryMatrices], total[kQueryMatrices], decay[kQueryMatrices];
  Int visible[kQueryMatrices];
  for (int v = 0; v < kQueryMatrices; ++v) {
    peak[v] = splat(-kInfinity);
    total[v] = Vec{};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int query = v * kLanes + lane;
      visible[v][lane] = tile.visible(query < tile.num_queries ? query : 0, args.group);
    }
  }

  Block<Bf16> blocks[2];
  if (!find_block(args, tile, begin, end, blocks[0])) return false;
  for (int first = begin, turn = 0; first < end; first += kBlockKeys, turn ^= 1) {
    const Block<Bf16>&block = blocks[turn], &next = blocks[turn ^ 1];
    if (!find_block(args, tile, first + kBlockKeys, end, blocks[turn ^ 1])) return false;
    const int num_chunks = round_up(block.num_keys, kDepth) / kDepth;
    multiply_keys(block, next, size, query_matrices, work);
    const bool is_masked = first + block.num_keys > tile.visible(0, args.group);
    for (int v = 0; v < query_matrices; ++v) {
      float* column = work.scores + v * kLanes;
      for (int key = 0; is_masked && key < block.num_keys; ++key) {
        float* at = column + key * kTileQueries;
        store(at, select(Int{} + first + key < visible[v], load(at), splat(-kInfinity)));
      }
      decay[v] = soften_scaled(column, block.num_keys, args.scale, peak[v], total[v]);
      for (int key = block.num_keys; key < num_chunks * kDepth; ++key) {
        store(column + key * kTileQueries, Vec{});
      }
      for (int chunk = 0; chunk < num_chunks; ++chunk) pack_weights(chunk, v, work);
    }
    pack_values(block, num_chunks, size, work);
    shrink_sums(decay, query_matrices, work);
    multiply_values(num_chunks, query_matrices, work);
  }

  for (int q = 0; q < tile.num_queries; ++q) {
    __builtin_memcpy(result.sum + q * size, work.sums + q * width, size * sizeof(float));
    result.peak[q] = peak[q / kLanes][q % kLanes];
    result.total[q] = total[q / kLanes][q % kLanes];
  }
  return true;
}

int attend_tile_queries() { return kTileQueries; }

int64_t attend_scratch_floats(int head_size) {
  return kTileQueries * (head_size + 2) + kLanes + Workspace(nullptr, head_size).num_words;
}

bool attend_split(const AttendArgs& args, const AttendTile& tile, int split, float* scratch) {
  const int begin = split * tile.split_keys;
  const int last_visible = tile.visible(tile.num_queries - 1, args.group);
  const int end = last_visible < begin + tile.split_keys ? last_visible : begin + tile.split_keys;
  const Partial result(scratch, tile.num_queries, args.head_size);
  const int64_t result_words = round_up(kTileQueries * (args.head_size + 2), kLanes);
  _tile_loadconfig(&kTileShapes);
  const bool found =
      prefill(args, tile, begin, end, result, Workspace(scratch + result_words, args.head_size));
  _tile_release();
  if (found) finish_split(args, tile, split, result);
  return found;
}
