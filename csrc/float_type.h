// From the run-time type of a tensor to the type of a kernel's template.
#pragma once

namespace budgetkv {

// Models compute in the first three; keys and values may be stored in any.
enum class FloatType { kFloat32, kBfloat16, kFloat16, kFloat8 };

}  // namespace budgetkv

// Returns `function<T>(...)`, T being the type's name in the surrounding instruction set.
#define BUDGETKV_FOR_FLOAT_TYPE(type, function, ...)                           \
  switch (type) {                                                              \
    case ::budgetkv::FloatType::kFloat32: return function<float>(__VA_ARGS__); \
    case ::budgetkv::FloatType::kBfloat16: return function<Bf16>(__VA_ARGS__); \
    case ::budgetkv::FloatType::kFloat16: return function<Fp16>(__VA_ARGS__);  \
    case ::budgetkv::FloatType::kFloat8: return function<Fp8>(__VA_ARGS__);    \
  }                                                                            \
  __builtin_unreachable()
