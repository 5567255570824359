#include "isa.h"

#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace budgetkv {
namespace {

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kGeneric: return true;
  }
#endif
  return isa == Isa::kGeneric;
}

Isa best_isa() {
  if (is_supported(Isa::kAvx512)) return Isa::kAvx512;
  return is_supported(Isa::kAvx2) ? Isa::kAvx2 : Isa::kGeneric;
}

Isa parse(const std::string& name) {
  TORCH_CHECK_VALUE(name == "avx512" || name == "avx2" || name == "generic", "instruction set ",
                    name, " is unknown: choose avx512, avx2 or generic");
  const Isa isa = name == "avx512" ? Isa::kAvx512 : name == "avx2" ? Isa::kAvx2 : Isa::kGeneric;
  TORCH_CHECK_VALUE(is_supported(isa), "this CPU does not support ", name,
                    ": unset VLLM_BUDGETKV_ISA to let the kernels choose");
  return isa;
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa = [] {
    const char* name = std::getenv("VLLM_BUDGETKV_ISA");
    return name == nullptr ? best_isa() : parse(name);
  }();
  return isa;
}

void set_isa(std::string name) { selected() = parse(name); }

std::string get_isa() {
  switch (current_isa()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kGeneric: break;
  }
  return "generic";
}

}  // namespace

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

}  // namespace budgetkv

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  // Tests switch between the copies of the kernels with set_isa; servers have no need of it.
  m.def("set_isa(str name) -> ()", &budgetkv::set_isa);
  m.def("get_isa() -> str", &budgetkv::get_isa);
}
