// Attention of one tile of queries to one split of a head's keys, with an online softmax
// (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867). What prefill and decode share; their
// inner loops are in attend_prefill.inl and attend_decode.inl.

constexpr int kBlockKeys = 64;  // keys between two updates of the softmax
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

template <class T>
BUDGETKV_INLINE const T* query_row(const AttendArgs& args, const AttendTile& tile, int query) {
  const int head = tile.kv_head * args.group + (tile.first_query + query) % args.group;
  const int64_t token = tile.first_token + tile.token_of(query, args.group);
  return static_cast<const T*>(args.query) + token * args.query_token_stride +
         head * args.query_head_stride;
}

template <class T>
BUDGETKV_INLINE void write_row(const AttendArgs& args, const AttendTile& tile, int query,
                               const float* sum, float total) {
  const int head = tile.kv_head * args.group + (tile.first_query + query) % args.group;
  const int64_t token = tile.first_token + tile.token_of(query, args.group);
  T* out = static_cast<T*>(args.out) + token * args.out_token_stride + head * args.out_head_stride;
  const Vec weight = splat(total > 0 || total != total ? 1.0f / total : 0.0f);
  for_each_vector(args.head_size, [&](int d, bool is_tail) {
    store(out + d, load(sum + d, is_tail) * weight, is_tail);
  });
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

#include "attend_decode.inl"
#include "attend_prefill.inl"

// Where the result of a split goes: to `out` if it is the only one.
template <class T>
BUDGETKV_INLINE void finish_split(const AttendArgs& args, const AttendTile& tile, int split,
                                  const Partial& result) {
  if (tile.num_splits == 1) {
    for (int q = 0; q < tile.num_queries; ++q) {
      write_row<T>(args, tile, q, result.sum + q * args.head_size, result.total[q]);
    }
    return;
  }
  const int64_t size = static_cast<int64_t>(tile.num_queries) * (args.head_size + 2);
  __builtin_memcpy(tile.partials + split * size, result.sum, size * sizeof(float));
}

template <class T>
BUDGETKV_INLINE bool split_of_type(const AttendArgs& args, const AttendTile& tile, int split,
                                   float* scratch) {
  const int begin = split * tile.split_keys;
  const int last_visible = tile.visible(tile.num_queries - 1, args.group);
  const int end = last_visible < begin + tile.split_keys ? last_visible : begin + tile.split_keys;
  const Partial result(scratch, tile.num_queries, args.head_size);
  float* rest = scratch + attend_tile_queries() * (args.head_size + 2);
  rest += (kLanes - (rest - scratch) % kLanes) % kLanes;
  const int vectors = (tile.num_queries + kLanes - 1) / kLanes;
  const bool found = tile.is_decode ? decode<T>(args, tile, begin, end, result, rest)
                     : vectors == 1 ? prefill<T, 1>(args, tile, begin, end, result, rest)
                     : vectors == 2 ? prefill<T, 2>(args, tile, begin, end, result, rest)
                                    : prefill<T, 3>(args, tile, begin, end, result, rest);
  if (found) finish_split<T>(args, tile, split, result);
  return found;
}

template <class T>
BUDGETKV_INLINE void combine_of_type(const AttendArgs& args, const AttendTile& tile, float* sum) {
  const int size = args.head_size;
  const int64_t stride = static_cast<int64_t>(tile.num_queries) * (size + 2);
  for (int q = 0; q < tile.num_queries; ++q) {
    float peak = -kInfinity, total = 0;
    for (int split = 0; split < tile.num_splits; ++split) {
      const float other = Partial(tile.partials + split * stride, tile.num_queries, size).peak[q];
      peak = other > peak ? other : peak;
    }
    for (int d = 0; d < size; ++d) sum[d] = 0;
    for (int split = 0; split < tile.num_splits; ++split) {
      const Partial part(tile.partials + split * stride, tile.num_queries, size);
      if (part.total[q] == 0) continue;  // the query sees no key of this split
      const Vec weight = exp(splat(part.peak[q] - peak));
      total += weight[0] * part.total[q];
      for_each_vector(size, [&](int d, bool is_tail) {
        const Vec more = load(part.sum + q * size + d, is_tail) * weight;
        store(sum + d, load(sum + d, is_tail) + more, is_tail);
      });
    }
    write_row<T>(args, tile, q, sum, total);
  }
}

int attend_tile_queries() { return kTileQueries; }

int64_t attend_scratch_floats(int head_size) {
  const int64_t result = kTileQueries * (head_size + 2) + kLanes;
  const int64_t of_prefill = prefill_scratch_floats(head_size);
  const int64_t of_decode = decode_scratch_floats(head_size);
  return result + (of_prefill > of_decode ? of_prefill : of_decode);
}

bool attend_split(const AttendArgs& args, const AttendTile& tile, int split, float* scratch) {
  switch (args.type) {
    case FloatType::kBfloat16: return split_of_type<Bf16>(args, tile, split, scratch);
    case FloatType::kFloat16: return split_of_type<Fp16>(args, tile, split, scratch);
    case FloatType::kFloat32: break;
  }
  return split_of_type<float>(args, tile, split, scratch);
}

void attend_combine(const AttendArgs& args, const AttendTile& tile, float* scratch) {
  switch (args.type) {
    case FloatType::kBfloat16: return combine_of_type<Bf16>(args, tile, scratch);
    case FloatType::kFloat16: return combine_of_type<Fp16>(args, tile, scratch);
    case FloatType::kFloat32: return combine_of_type<float>(args, tile, scratch);
  }
}
