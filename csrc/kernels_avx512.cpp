// Every header comes before the pragma: an inline function of the standard library compiled with
// AVX-512 could be the copy that the linker keeps for the whole process.
#include "kernel_headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define BUDGETKV_LANES 16
namespace budgetkv::avx512 {
#include "simd.h"
#include "attend_kernel.inl"
#include "contrast_kernel.inl"
#include "digest_kernel.inl"
#include "quantise_kernel.inl"
#include "recall_kernel.inl"
#include "retrieve_kernel.inl"
#include "score_kernel.inl"
#include "merge_kernel.inl"
}  // namespace budgetkv::avx512
#endif
