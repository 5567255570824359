// The kept token that every dropped token goes to, and the weighted mean that takes it in.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"
#include "score.h"

namespace budgetkv {

// One head, or its tokens of one modality. A token is named by the offset of its first byte in a
// field of the pool; keys and values have the same offsets.
struct PivotTask {
  FloatType type;
  const char* keys;
  int64_t head_size;
  const int64_t *kept, *dropped;  // [num_kept], [num_dropped], offsets
  int64_t num_kept, num_dropped;  // at least one of each
  float* packed;                  // scratch [num_kept up to whole blocks, head_size]
  float* rows;                    // scratch [kRowTile, head_size]
  float* cosines;                 // scratch [kRowTile, kBlockTokens]
  int64_t* pivots;                // [num_dropped], mutated: index in `kept`
  float* similarities;  // [num_dropped], mutated: cosine of the dropped token and its pivot
};

// pivot = (own_weight * pivot + sum of weight * source) / total_weight, on one field.
struct MixTask {
  FloatType type;
  char* field;
  int64_t head_size;
  int64_t pivot;           // offset
  const int64_t* sources;  // [num_sources], offsets
  const float* weights;    // [num_sources]
  int64_t num_sources;
  float own_weight, total_weight;
};

BUDGETKV_DECLARE(void find_pivots(const PivotTask& task); void mix(const MixTask& task);
                 // L2 norm of one key or value.
                 float token_norm(FloatType type, const char* token, int64_t head_size))

}  // namespace budgetkv
