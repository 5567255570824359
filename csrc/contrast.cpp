// contrast: 1 - cos(key, mean of the normalised keys) of every token of one request and layer.
//
// H heads, W table width, P pages, N tokens of a page, D head size, n width of the result.
// Spec: vllm_budgetkv/ops/reference/contrast.py.
#include "contrast.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tables.h"

namespace budgetkv {
namespace {

constexpr int64_t kRunTokens = 256;  // summed alone first: so rounding grows with the runs only

struct Run {
  int64_t head, first_token, num_tokens;
};

std::vector<Run> runs_of(const at::TensorAccessor<int32_t, 1>& lens) {
  std::vector<Run> runs;
  for (int64_t h = 0; h < lens.size(0); ++h) {
    for (int64_t first = 0; first < lens[h]; first += kRunTokens) {
      runs.push_back({h, first, std::min<int64_t>(kRunTokens, lens[h] - first)});
    }
  }
  return runs;
}

// Calls `body(keys, num_tokens, token)` for every stretch of a run that lies in one page.
template <class Body>
void for_each_page(const Run& run, const at::Tensor& keys, const int32_t* table, Body body) {
  const char* data = static_cast<const char*>(keys.const_data_ptr());
  const int64_t page_tokens = keys.size(1), token_bytes = keys.size(2) * keys.itemsize();
  const int64_t page_bytes = keys.stride(0) * keys.itemsize();
  const int64_t end = run.first_token + run.num_tokens;
  for (int64_t token = run.first_token, next = token; token < end; token = next) {
    next = std::min((token / page_tokens + 1) * page_tokens, end);
    const char* page = data + table[token / page_tokens] * page_bytes;
    body(page + token % page_tokens * token_bytes, next - token, token);
  }
}

// [H, D]: the direction of each head's sum over its runs, whose sums are [runs, D].
std::vector<float> anchors_of(const std::vector<Run>& runs, const std::vector<float>& sums,
                              int64_t num_heads, int64_t head_size) {
  std::vector<float> anchors(num_heads * head_size, 0.0f);
  for (size_t r = 0; r < runs.size(); ++r) {
    float* anchor = &anchors[runs[r].head * head_size];
    for (int64_t d = 0; d < head_size; ++d) anchor[d] += sums[r * head_size + d];
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    float* anchor = &anchors[h * head_size];
    double squares = 0.0;
    for (int64_t d = 0; d < head_size; ++d) squares += double{anchor[d]} * anchor[d];
    const float factor = 1.0 / std::max(std::sqrt(squares), 1e-12);
    for (int64_t d = 0; d < head_size; ++d) anchor[d] *= factor;
  }
  return anchors;
}

}  // namespace

at::Tensor contrast(const at::Tensor& keys,      // [P, N, D]
                    const at::Tensor& table_in,  // int32 [H, W]
                    const at::Tensor& lens_in,   // int32 [H]
                    int64_t max_tokens) {
  const at::Tensor table = table_in.contiguous();
  const auto pages = table.accessor<int32_t, 2>();
  const auto lens = lens_in.accessor<int32_t, 1>();
  const int64_t num_heads = lens.size(0), head_size = keys.size(2);
  for (int64_t h = 0; h < num_heads; ++h) {
    TORCH_CHECK_VALUE(lens[h] <= max_tokens, "head ", h, " holds ", lens[h],
                      " tokens but max_tokens is ", max_tokens);
    check_head(pages[h], lens[h], keys.size(1), keys.size(0));
  }
  at::Tensor found = at::zeros({num_heads, max_tokens}, at::TensorOptions().dtype(at::kFloat));
  const FloatType type = float_type(keys.scalar_type());
  const auto runs = runs_of(lens);
  std::vector<float> sums(runs.size() * head_size, 0.0f);
  const auto add_directions = BUDGETKV_PICK(add_directions);
  at::parallel_for(0, runs.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto add = [&](const char* from, int64_t num_tokens, int64_t) {
        add_directions(type, from, num_tokens, head_size, &sums[r * head_size]);
      };
      for_each_page(runs[r], keys, pages[runs[r].head].data(), add);
    }
  });
  const auto anchors = anchors_of(runs, sums, num_heads, head_size);
  float* out = found.mutable_data_ptr<float>();
  const auto contrast_tokens = BUDGETKV_PICK(contrast_tokens);
  at::parallel_for(0, runs.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t head = runs[r].head;
      const auto compare = [&](const char* from, int64_t num_tokens, int64_t token) {
        contrast_tokens(type, from, num_tokens, head_size, &anchors[head * head_size],
                        out + head * max_tokens + token);
      };
      for_each_page(runs[r], keys, pages[head].data(), compare);
    }
  });
  return found;
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def("contrast(Tensor keys, Tensor table, Tensor lens, int max_tokens) -> Tensor");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("contrast", &contrast); }

}  // namespace budgetkv
