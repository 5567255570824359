// stage: copy blocks of host memory to pages of the pool.
//
// P pages and B host blocks of N tokens, H heads, D head size, M blocks of a request, W pages.
// Spec: vllm_budgetkv/ops/reference/stage.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#include "checks.h"

namespace budgetkv {

void stage(const at::Tensor& keys,       // [P, N, D], mutated
           const at::Tensor& values,     // as keys
           const at::Tensor& pages_in,   // int32 [H, W]
           const at::Tensor& tokens,     // [B, H, 2, N, D]
           const at::Tensor& blocks_in,  // int32 [M]
           int64_t first_block) {
  check_pool_field("keys", keys);
  check_pool_field("values", values);
  const auto pages = pages_in.accessor<int32_t, 2>();
  const auto blocks = blocks_in.accessor<int32_t, 1>();
  const int64_t width = pages.size(1), item = tokens.element_size();
  TORCH_CHECK_INDEX(first_block >= 0 && first_block + width <= blocks.size(0), "stage: blocks ",
                    first_block, " to ", first_block + width, " of ", blocks.size(0));
  for (int64_t i = 0; i < width; ++i) {
    const int64_t block = blocks[first_block + i];
    TORCH_CHECK_INDEX(block >= 0 && block < tokens.size(0), "stage: block ", first_block + i,
                      " is ", block, ", but there are ", tokens.size(0));
    for (int64_t h = 0; h < pages.size(0); ++h) {
      TORCH_CHECK_INDEX(pages[h][i] >= 0 && pages[h][i] < keys.size(0), "stage: head ", h,
                        " has page ", pages[h][i], ", but there are ", keys.size(0));
    }
  }
  TORCH_CHECK_VALUE(tokens.select(0, 0).is_contiguous(),
                    "stage: what a host block keeps is not contiguous");
  const char* kept = static_cast<const char*>(tokens.const_data_ptr());
  char* to[] = {static_cast<char*>(keys.data_ptr()), static_cast<char*>(values.data_ptr())};
  const int64_t part_bytes = keys.size(1) * keys.size(2) * item;
  constexpr int64_t kPagesPerTask = 16;
  at::parallel_for(0, width * pages.size(0), kPagesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n / pages.size(0), h = n % pages.size(0);
      const int64_t block = blocks[first_block + i];
      const char* from = kept + (block * tokens.stride(0) + h * tokens.stride(1)) * item;
      for (int64_t part = 0; part < 2; ++part) {
        std::memcpy(to[part] + pages[h][i] * keys.stride(0) * item, from + part * part_bytes,
                    part_bytes);
      }
    }
  });
}

}  // namespace budgetkv

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "stage(Tensor(a!) keys, Tensor(b!) values, Tensor pages, Tensor tokens, Tensor blocks, "
      "int first_block) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("stage", &budgetkv::stage); }
