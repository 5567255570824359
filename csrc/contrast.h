// Directions of the keys of one page: their sum, and their cosines with an anchor.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace budgetkv {

BUDGETKV_DECLARE(void add_directions(FloatType type,
                                     const void* keys,  // [num_tokens, head_size]
                                     int64_t num_tokens, int64_t head_size,
                                     float* sum);  // [head_size], mutated
                 void contrast_tokens(FloatType type,
                                      const void* keys,  // [num_tokens, head_size]
                                      int64_t num_tokens, int64_t head_size,
                                      const float* anchor,  // [head_size], of length 1
                                      float* contrasts))    // [num_tokens], mutated

}  // namespace budgetkv
