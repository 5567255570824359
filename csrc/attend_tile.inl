// What every way to attend shares: where queries, keys and results of a tile lie, and the online
// softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867).

// Keys between two updates of the softmax.
#ifndef BUDGETKV_BLOCK_KEYS
#define BUDGETKV_BLOCK_KEYS 64
#endif
constexpr int kBlockKeys = BUDGETKV_BLOCK_KEYS;
constexpr int kMaxHeadSize = 256;
constexpr float kInfinity = __builtin_inff();
alignas(64) constexpr float kZeroRow[kMaxHeadSize] = {};

// Result of a split before normalisation: query `q` has the weighted sum of values `sum[q * D]`,
// the greatest score `peak[q]` and the total weight `total[q]`.
struct Partial {
  float* sum;
  float* peak;
  float* total;
  Partial(float* base, int num_queries, int head_size)
      : sum(base), peak(base + num_queries * head_size), total(peak + num_queries) {}
};

// First element of a query in `args.query`.
BUDGETKV_INLINE int64_t place_of_query(const AttendArgs& args, const AttendTile& tile, int query) {
  const int head = tile.kv_head * args.group + (tile.first_query + query) % args.group;
  const int64_t token = tile.first_token + tile.token_of(query, args.group);
  return token * args.query_token_stride + head * args.query_head_stride;
}

// to [D] = the query, times the scale; `to` is padded to whole vectors.
BUDGETKV_INLINE void read_query(const AttendArgs& args, const AttendTile& tile, int query,
                                float* to) {
  const int64_t place = place_of_query(args, tile, query);
  for_each_vector(args.head_size, [&](int d, bool is_tail) {
    store(to + d, load_as(args.type, args.query, place + d, is_tail) * args.scale);
  });
}

BUDGETKV_INLINE void write_row(const AttendArgs& args, const AttendTile& tile, int query,
                               const float* sum, float peak, float total) {
  const int head = tile.kv_head * args.group + (tile.first_query + query) % args.group;
  const int64_t token = tile.first_token + tile.token_of(query, args.group);
  const int64_t place = token * args.out_token_stride + head * args.out_head_stride;
  if (args.lse == nullptr) {
    if (args.sinks != nullptr && total > 0) {
      // beyond that, what the tokens give vanishes beside it in any case
      constexpr float kMostAbove = 80.0f;
      const float above = args.sinks[head] - peak;
      total += exp(splat(above < kMostAbove ? above : kMostAbove))[0];
    }
  }
  const FloatType type = args.lse == nullptr ? args.type : FloatType::kFloat32;
  const Vec weight = splat(total > 0 || total != total ? args.value_unit / total : 0.0f);
  for_each_vector(args.head_size, [&](int d, bool is_tail) {
    store_as(type, args.out, place + d, load(sum + d, is_tail) * weight, is_tail);
  });
  if (args.lse == nullptr) return;
  // a query that sees no key has no weight
  args.lse[token * args.num_query_heads + head] =
      total == 0 ? -kInfinity : peak + __builtin_logf(total);
}

// Where up to kBlockKeys tokens of a head lie; the arrays have room for whole vectors of keys.
template <class T>
struct Block {
  int num_keys;
  const T* keys[kBlockKeys];
  const T* values[kBlockKeys];
};

// The block of tokens from `begin` on, none at or behind `end`. False if a page id is wild.
template <class T>
BUDGETKV_INLINE bool find_block(const AttendArgs& args, const AttendTile& tile, int begin, int end,
                                Block<T>& block) {
  const int in_page = args.page_tokens - 1;  // N is a power of two
  const int shift = __builtin_ctz(args.page_tokens);
  end = end < begin + kBlockKeys ? end : begin + kBlockKeys;
  block.num_keys = end > begin ? end - begin : 0;
  for (int key = begin; key < end;) {
    const int64_t page = tile.pages[key >> shift];
    if (page < 0 || page >= args.num_pages) return false;
    int64_t offset = page * args.page_stride + (key & in_page) * args.head_size;
    const int page_end = (key | in_page) + 1;
    for (; key < end && key < page_end; ++key, offset += args.head_size) {
      block.keys[key - begin] = static_cast<const T*>(args.keys) + offset;
      block.values[key - begin] = static_cast<const T*>(args.values) + offset;
    }
  }
  return true;
}

// Fetches `count` tokens of the next block while this one is computed: pages lie anywhere, so the
// processor cannot guess where to read on.
template <class T>
BUDGETKV_INLINE void prefetch(const Block<T>& next, int first, int count, int size) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = first; i < first + count && i < next.num_keys; ++i) {
    for (int d = 0; d < size; d += kLine) {
      __builtin_prefetch(next.keys[i] + d, 0, 2);
      __builtin_prefetch(next.values[i] + d, 0, 2);
    }
  }
}

// Bends the scores of whole vectors to stay below the soft cap, if there is one.
BUDGETKV_INLINE void cap_scores(const AttendArgs& args, float* scores, int stride, int count) {
  if (args.soft_cap == 0) return;
  const float unit = 1.0f / args.soft_cap;
  for (int i = 0; i < count; ++i, scores += stride) {
    store(scores, tanh(load(scores) * unit) * args.soft_cap);
  }
}

// Turns one vector of queries' scores into weights and moves its peak and total along. Returns the
// factor by which what was summed before must shrink.
BUDGETKV_INLINE Vec soften(float* scores, int stride, int num_keys, Vec& peak, Vec& total) {
  Vec higher = peak;
  for (int key = 0; key < num_keys; ++key) higher = max(higher, load(scores + key * stride));
  // A query that has seen no key yet has the peak -inf: subtract 0 instead, to get weights of 0.
  const Vec shift = select(higher == -kInfinity, Vec{}, higher);
  const Vec decay = exp(peak - shift);
  Vec sum = {};
  for (int key = 0; key < num_keys; ++key) {
    const Vec weight = exp(load(scores + key * stride) - shift);
    store(scores + key * stride, weight);
    sum += weight;
  }
  peak = higher;
  total = total * decay + sum;
  return decay;
}

// Where the result of a split goes: to `out` if it is the only one.
BUDGETKV_INLINE void finish_split(const AttendArgs& args, const AttendTile& tile, int split,
                                  const Partial& result) {
  if (tile.num_splits == 1) {
    for (int q = 0; q < tile.num_queries; ++q) {
      write_row(args, tile, q, result.sum + q * args.head_size, result.peak[q], result.total[q]);
    }
    return;
  }
  const int64_t size = static_cast<int64_t>(tile.num_queries) * (args.head_size + 2);
  __builtin_memcpy(tile.partials + split * size, result.sum, size * sizeof(float));
}
