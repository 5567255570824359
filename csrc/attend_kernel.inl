// Attention of one tile of queries to one split of a head's keys. The inner loops are in
// attend_prefill.inl and attend_decode.inl.

#include "attend_tile.inl"

#include "attend_decode.inl"
#include "attend_prefill.inl"

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
  if (found) finish_split(args, tile, split, result);
  return found;
}

void attend_combine(const AttendArgs& args, const AttendTile& tile, float* sum) {
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
    write_row(args, tile, q, sum, peak, total);
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
  BUDGETKV_FOR_FLOAT_TYPE(args.key_type, split_of_type, args, tile, split, scratch);
}
