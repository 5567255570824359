// Numbers as 8-bit floats.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace budgetkv {

BUDGETKV_DECLARE(void quantise_row(FloatType type, const void* from, int64_t size, float unit,
                                   void* to))  // [size], a multiple of 8; mutated

}  // namespace budgetkv
