// Everything that a kernel copy needs from outside; see kernels_avx512.cpp. No torch header.
#pragma once

#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attend.h"
#include "contrast.h"
#include "digest.h"
#include "float_type.h"
#include "merge.h"
#include "quantise.h"
#include "recall.h"
#include "retrieve.h"
#include "score.h"
