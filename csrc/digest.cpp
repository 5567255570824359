// digest: centre and radius of the keys of every page of one request and layer.
//
// H heads, W table width, P pages, N tokens of a page, D head size.
// Spec: vllm_budgetkv/ops/reference/digest.py.
#include "digest.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "tables.h"

namespace budgetkv {
namespace {

struct HeldPage {
  int64_t id, num_tokens;
};

std::vector<HeldPage> held_pages(const at::TensorAccessor<int32_t, 2>& table,
                                 const at::TensorAccessor<int32_t, 1>& lens, int64_t page_tokens,
                                 int64_t pool_pages) {
  std::vector<HeldPage> pages;
  for (int64_t h = 0; h < lens.size(0); ++h) {
    check_head(table[h], lens[h], page_tokens, pool_pages);
    for (int64_t first = 0; first < lens[h]; first += page_tokens) {
      pages.push_back({table[h][first / page_tokens], std::min(page_tokens, lens[h] - first)});
    }
  }
  return pages;
}

}  // namespace

void digest(const at::Tensor& keys,     // [P, N, D]
            const at::Tensor& digests,  // [P, 2, D]
            const at::Tensor& table,    // int32 [H, W]
            const at::Tensor& lens      // int32 [H]
) {
  const auto pages = held_pages(table.accessor<int32_t, 2>(), lens.accessor<int32_t, 1>(),
                                keys.size(1), keys.size(0));
  const char* key_data = static_cast<const char*>(keys.const_data_ptr());
  char* digest_data = static_cast<char*>(digests.mutable_data_ptr());
  const int64_t page_bytes = keys.stride(0) * keys.itemsize();
  const FloatType key_type = float_type(keys.scalar_type());
  const FloatType digest_type = float_type(digests.scalar_type());
  const auto digest_page = BUDGETKV_PICK(digest_page);
  constexpr int64_t kPagesPerTask = 16;
  at::parallel_for(0, pages.size(), kPagesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = pages[i].id * page_bytes;
      digest_page(key_type, key_data + offset, pages[i].num_tokens, keys.size(2), digest_type,
                  digest_data + offset);
    }
  });
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def("digest(Tensor keys, Tensor(a!) digests, Tensor table, Tensor lens) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("digest", &digest); }

}  // namespace budgetkv
