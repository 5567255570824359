// The instruction sets that every vectorised kernel is compiled for, and the one in use. With AMX,
// kernels are those of AVX-512, but for what kernels_amx.cpp has.
//
// A kernel lives in a `<op>_kernel.inl` that `kernels_avx512.cpp`, `kernels_avx2.cpp` and
// `kernels_generic.cpp` each compile into a namespace of their own. Its functions are declared
// once with BUDGETKV_DECLARE and called through BUDGETKV_PICK.
#pragma once

namespace budgetkv {

// In their order; each does what the ones before it do.
enum class Isa { kGeneric, kAvx2, kAvx512, kAmx };

// The best instruction set of this CPU, or what VLLM_BUDGETKV_ISA or set_isa asked for.
Isa current_isa();

}  // namespace budgetkv

#if defined(__x86_64__)
#define BUDGETKV_DECLARE(...) \
  namespace avx512 {          \
  __VA_ARGS__;                \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__;                \
  }                           \
  namespace generic {         \
  __VA_ARGS__;                \
  }
#define BUDGETKV_PICK(function)                                              \
  (::budgetkv::current_isa() >= ::budgetkv::Isa::kAvx512 ? &avx512::function \
   : ::budgetkv::current_isa() == ::budgetkv::Isa::kAvx2 ? &avx2::function   \
                                                         : &generic::function)
#else
#define BUDGETKV_DECLARE(...) \
  namespace generic {         \
  __VA_ARGS__;                \
  }
#define BUDGETKV_PICK(function) (&generic::function)
#endif
