// Attention of prompts in bfloat16 on CPUs with AMX; all else of them is kernels_avx512.cpp's.
#include "kernel_headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define BUDGETKV_LANES 16
// the output is read and written once per block, so blocks are longer than elsewhere
#define BUDGETKV_BLOCK_KEYS 128
namespace budgetkv::amx {
#include "simd.h"
#include "attend_tile.inl"
#include "attend_amx.inl"
}  // namespace budgetkv::amx
#endif
