// The baseline of the platform: SSE2 on x86-64, NEON on aarch64.
#include "kernel_headers.h"

#define BUDGETKV_LANES 4
namespace budgetkv::generic {
#include "simd.h"
#include "attend_kernel.inl"
#include "contrast_kernel.inl"
#include "digest_kernel.inl"
#include "quantise_kernel.inl"
#include "recall_kernel.inl"
#include "retrieve_kernel.inl"
#include "score_kernel.inl"
#include "merge_kernel.inl"
}  // namespace budgetkv::generic
