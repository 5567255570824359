// select: the min(budget, len) best tokens of every head, by (tier, score, recency).
//
// H heads, n tokens. Spec: vllm_budgetkv/ops/reference/select.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "rank.h"

namespace budgetkv {
namespace {

void select_head(const float* scores, const uint8_t* tiers, int64_t num_tokens, int64_t budget,
                 bool* keep) {
  const int64_t count = std::clamp<int64_t>(budget, 0, num_tokens);
  if (count == num_tokens) {
    std::fill_n(keep, num_tokens, true);
    return;
  }
  std::vector<uint64_t> keys(num_tokens);
  for (int64_t i = 0; i < num_tokens; ++i) keys[i] = rank_key(tiers[i], scores[i], i);
  rank_best(keys.data(), num_tokens, count);
  for (int64_t i = 0; i < count; ++i) keep[rank_index(keys[i])] = true;
}

}  // namespace

at::Tensor select(const at::Tensor& scores_in,  // float32 [H, n]
                  const at::Tensor& tiers_in,   // uint8 [H, n]
                  const at::Tensor& lens_in,    // int32 [H]
                  const at::Tensor& budgets_in  // int32 [H]
) {
  const at::Tensor scores = scores_in.contiguous(), tiers = tiers_in.contiguous();
  const auto lens = lens_in.accessor<int32_t, 1>(), budgets = budgets_in.accessor<int32_t, 1>();
  const int64_t num_heads = scores.size(0), num_tokens = scores.size(1);
  for (int64_t h = 0; h < num_heads; ++h) {
    TORCH_CHECK_VALUE(lens[h] >= 0 && lens[h] <= num_tokens, "head ", h, " holds ", lens[h],
                      " tokens but scores cover ", num_tokens);
  }
  at::Tensor keep = at::zeros(scores.sizes(), scores.options().dtype(at::kBool));
  const float* score_data = scores.const_data_ptr<float>();
  const uint8_t* tier_data = tiers.const_data_ptr<uint8_t>();
  bool* keep_data = keep.mutable_data_ptr<bool>();
  at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const int64_t row = h * num_tokens;
      select_head(score_data + row, tier_data + row, lens[h], budgets[h], keep_data + row);
    }
  });
  return keep;
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def("select(Tensor scores, Tensor tiers, Tensor lens, Tensor budgets) -> Tensor");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("select", &select); }

}  // namespace budgetkv
