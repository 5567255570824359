// Centre and radius of the keys of one page.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace budgetkv {

BUDGETKV_DECLARE(void digest_page(FloatType key_type,
                                  const void* keys,  // [num_tokens, head_size]
                                  int64_t num_tokens, int64_t head_size, FloatType digest_type,
                                  void* digest))  // [2, head_size], mutated

}  // namespace budgetkv
