// Work of the attend op, as the driver (attend.cpp) hands it to a kernel (attend_kernel.inl).
//
// The queries of one batch row that use one KV head are numbered m = token * G + g, where `token`
// counts from the row's first and g is the query head within the group. A tile is a run of them.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace budgetkv {

// What all tiles share. Strides count elements.
struct AttendArgs {
  FloatType type;      // of query and, without `lse`, out
  FloatType key_type;  // of keys and values
  const void* query;   // [T, Hq, D]
  int64_t query_token_stride, query_head_stride;
  void* out;  // [T, Hq, D], float32 with `lse`
  int64_t out_token_stride, out_head_stride;
  float* lse;          // [T, Hq], dense: the logarithm of each query's weights; null if nobody asks
  const void* keys;    // [P, N, D], pages `page_stride` apart
  const void* values;  // as keys
  int64_t page_stride;
  int64_t num_pages;    // P
  int page_tokens;      // N
  int head_size;        // D
  int group;            // G
  int num_query_heads;  // Hq
  float scale;          // of the scores
  float soft_cap;       // that bends them; 0 for none
  float value_unit;     // what a stored value of 1 stands for
  const float* sinks;   // [Hq], scores of tokens without a value; null for none, and with `lse`
};

struct AttendTile {
  const int32_t* pages;  // the head's table entries
  int64_t first_token;   // of the batch row, in query and out
  int kv_head;
  int first_query;  // m of the tile's first query
  int num_queries;
  int first_visible;     // keys that the row's first token sees; not positive if none
  const int32_t* ahead;  // of each token of the row, keys behind it that it sees too; null for none
  int num_keys;          // that the head has
  bool is_decode;        // the row is one token, and the tile is its whole group
  int num_splits;        // the keys are cut into runs of split_keys
  int split_keys;
  float* partials;  // [num_splits, num_queries, D + 2]; unused if there is one split

  int token_of(int query, int group) const { return (first_query + query) / group; }
  int visible(int query, int group) const {
    const int token = token_of(query, group);
    const int keys = first_visible + token + (ahead == nullptr ? 0 : ahead[token]);
    return keys < 0 ? 0 : keys < num_keys ? keys : num_keys;
  }
};

constexpr int kMaxDecodeGroup = 8;
constexpr int64_t kScratchAlignment = 64;

// Queries of a tile, floats of scratch that a thread needs.
BUDGETKV_DECLARE(int attend_tile_queries())
BUDGETKV_DECLARE(int64_t attend_scratch_floats(int head_size))
// Attends to the keys of one split; false if the table holds a page id that is not in the pool.
BUDGETKV_DECLARE(bool attend_split(const AttendArgs&, const AttendTile&, int split, float* scratch))
// Prefill of bfloat16 where `current_isa()` is kAmx; decode and the rest are AVX-512's.
namespace amx {
int attend_tile_queries();
int64_t attend_scratch_floats(int head_size);
bool attend_split(const AttendArgs&, const AttendTile&, int split, float* scratch);
}  // namespace amx
// Joins the partial results of a tile.
BUDGETKV_DECLARE(void attend_combine(const AttendArgs&, const AttendTile&, float* scratch))

}  // namespace budgetkv
