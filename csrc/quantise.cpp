// quantise: keys and values as 8-bit floats.
//
// T tokens, H heads, D head size. Spec: vllm_budgetkv/ops/reference/quantise.py.
#include "quantise.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"

namespace budgetkv {
namespace {

at::Tensor quantise_tokens(const char* name, const at::Tensor& tokens,  // [T, H, D]
                           double unit) {
  check_last_stride(name, tokens);
  TORCH_CHECK_VALUE(tokens.size(2) % 8 == 0, name, " has heads of ", tokens.size(2),
                    " elements; the kernels need a multiple of 8");
  at::Tensor quantised = at::empty(tokens.sizes(), tokens.options().dtype(at::kFloat8_e4m3fn));
  const char* from = static_cast<const char*>(tokens.const_data_ptr());
  char* to = static_cast<char*>(quantised.mutable_data_ptr());
  const int64_t num_heads = tokens.size(1), head_size = tokens.size(2);
  const int64_t token_bytes = tokens.stride(0) * tokens.element_size();
  const int64_t head_bytes = tokens.stride(1) * tokens.element_size();
  const FloatType type = float_type(tokens.scalar_type());
  const auto quantise_row = BUDGETKV_PICK(quantise_row);
  constexpr int64_t kTokensPerTask = 64;
  at::parallel_for(0, tokens.size(0), kTokensPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < num_heads; ++h) {
        quantise_row(type, from + t * token_bytes + h * head_bytes, head_size,
                     static_cast<float>(unit), to + (t * num_heads + h) * head_size);
      }
    }
  });
  return quantised;
}

std::tuple<at::Tensor, at::Tensor> quantise(const at::Tensor& key, const at::Tensor& value,
                                            double key_unit, double value_unit) {
  return {quantise_tokens("key", key, key_unit), quantise_tokens("value", value, value_unit)};
}

}  // namespace
}  // namespace budgetkv

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def("quantise(Tensor key, Tensor value, float key_unit, float value_unit) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("quantise", &budgetkv::quantise); }
