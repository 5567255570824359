#include "isa.h"

#include <torch/library.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>
#include <utility>

namespace budgetkv {
namespace {

constexpr std::pair<Isa, const char*> kNames[] = {
    {Isa::kAmx, "amx"}, {Isa::kAvx512, "avx512"}, {Isa::kAvx2, "avx2"}, {Isa::kGeneric, "generic"}};

#if defined(__x86_64__)
// Whether the CPU multiplies bfloat16 matrices, and the system lets this process use its tiles.
bool has_tiles() {
  constexpr unsigned kBfloat16Tiles = 1u << 22, kTiles = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kBfloat16Tiles) || !(edx & kTiles)) return false;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAmx: return is_supported(Isa::kAvx512) && has_tiles();
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
  for (const auto& [isa, name] : kNames) {
    if (is_supported(isa)) return isa;
  }
  return Isa::kGeneric;
}

Isa parse(const std::string& wanted) {
  for (const auto& [isa, name] : kNames) {
    if (wanted != name) continue;
    TORCH_CHECK_VALUE(is_supported(isa), "this CPU does not support ", name,
                      ": unset VLLM_BUDGETKV_ISA to let the kernels choose");
    return isa;
  }
  TORCH_CHECK_VALUE(false, "instruction set ", wanted,
                    " is unknown: choose amx, avx512, avx2 or generic");
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
  for (const auto& [isa, name] : kNames) {
    if (isa == current_isa()) return name;
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

}  // namespace budgetkv

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  // Tests switch between the copies of the kernels with set_isa; servers have no need of it.
  m.def("set_isa(str name) -> ()", &budgetkv::set_isa);
  m.def("get_isa() -> str", &budgetkv::get_isa);
}
