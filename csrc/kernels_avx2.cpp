// Headers first, for the reason told in kernels_avx512.cpp.
#include "kernel_headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define BUDGETKV_LANES 8
namespace budgetkv::avx2 {
#include "simd.h"
#include "attend_kernel.inl"
#include "contrast_kernel.inl"
#include "digest_kernel.inl"
#include "quantise_kernel.inl"
#include "recall_kernel.inl"
#include "retrieve_kernel.inl"
#include "score_kernel.inl"
#include "merge_kernel.inl"
}  // namespace budgetkv::avx2
#endif
