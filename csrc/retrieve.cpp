// retrieve: the pages that each head reads in one decode step.
//
// R rows, S slots, H heads, G query heads per KV head, W table width, P pages, D head size.
// Spec: vllm_budgetkv/ops/reference/retrieve.py.
#include "retrieve.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "rank.h"
#include "tables.h"

namespace budgetkv {
namespace {

struct Share {
  double keep_ratio;
  int64_t sink_pages, window_pages;

  int64_t kept_pages(int64_t num_pages) const {
    const auto wanted = static_cast<int64_t>(std::ceil(keep_ratio * num_pages));
    return std::max(wanted, std::min(num_pages, sink_pages + window_pages));
  }
};

// Marks which of a dynamic head's pages to keep: sinks, window, and the best of those between.
std::vector<char> choose_pages(const PageQuery& query, const std::vector<int32_t>& pages,
                               const Share& share) {
  const int64_t num_pages = pages.size(), kept_pages = share.kept_pages(num_pages);
  std::vector<char> chosen(num_pages, kept_pages == num_pages);
  if (kept_pages == num_pages) return chosen;
  // fewer pages are kept than held, so sinks and window do not overlap
  const int64_t first = share.sink_pages, last = num_pages - share.window_pages;
  std::fill(chosen.begin(), chosen.begin() + first, true);
  std::fill(chosen.begin() + last, chosen.end(), true);

  std::vector<float> scores(last - first);
  BUDGETKV_PICK(score_pages)(query, pages.data() + first, last - first, scores.data());
  std::vector<uint64_t> keys(last - first);
  for (int64_t j = 0; j < last - first; ++j) keys[j] = rank_key(0, scores[j], first + j);
  const int64_t best_pages = kept_pages - first - share.window_pages;
  rank_best(keys.data(), last - first, best_pages);
  for (int64_t j = 0; j < best_pages; ++j) chosen[rank_index(keys[j])] = true;
  return chosen;
}

}  // namespace

void retrieve(const at::Tensor& query,       // [R, H * G, D]
              const at::Tensor& digests,     // [P, 2, D]
              const at::Tensor& table_in,    // int32 [S, H, W]
              const at::Tensor& lens_in,     // int32 [S, H]
              const at::Tensor& slots_in,    // int32 [R]
              const at::Tensor& dynamic_in,  // bool [S, H]
              int64_t page_tokens, double keep_ratio, int64_t sink_pages, int64_t window_pages,
              const at::Tensor& out_table_in,  // int32 [R, H, W]
              const at::Tensor& out_lens_in    // int32 [R, H]
) {
  const at::Tensor queries = query.to(at::kFloat).contiguous();
  const auto table = table_in.accessor<int32_t, 3>();
  const auto lens = lens_in.accessor<int32_t, 2>();
  const auto slots = slots_in.accessor<int32_t, 1>();
  const auto dynamic = dynamic_in.accessor<bool, 2>();
  auto out_table = out_table_in.accessor<int32_t, 3>();
  auto out_lens = out_lens_in.accessor<int32_t, 2>();
  const int64_t num_rows = slots.size(0), num_heads = table.size(1), width = table.size(2);
  const int64_t head_size = query.size(2), group = query.size(1) / num_heads;
  const Share share{keep_ratio, sink_pages, window_pages};
  for (int64_t r = 0; r < num_rows; ++r) {
    TORCH_CHECK_VALUE(slots[r] >= 0 && slots[r] < table.size(0), "slot ", slots[r], " of row ", r,
                      " is not one of ", table.size(0));
    for (int64_t h = 0; h < num_heads; ++h) {
      check_head(table[slots[r]][h], lens[slots[r]][h], page_tokens, digests.size(0));
    }
  }

  const char* digest_data = static_cast<const char*>(digests.const_data_ptr());
  const int64_t page_bytes = digests.stride(0) * digests.itemsize();
  at::parallel_for(0, num_rows * num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / num_heads, h = task % num_heads, slot = slots[r];
      const int64_t num_pages = ceil_div(lens[slot][h], page_tokens);
      std::vector<int32_t> pages(num_pages);
      for (int64_t j = 0; j < num_pages; ++j) pages[j] = table[slot][h][j];
      const PageQuery page_query{queries.const_data_ptr<float>() + task * group * head_size,
                                 group,
                                 head_size,
                                 float_type(digests.scalar_type()),
                                 digest_data,
                                 page_bytes};
      std::vector<char> chosen(num_pages, true);
      if (dynamic[slot][h]) chosen = choose_pages(page_query, pages, share);
      int64_t kept = 0;
      for (int64_t j = 0; j < num_pages; ++j) {
        if (chosen[j]) out_table[r][h][kept++] = pages[j];
      }
      out_lens[r][h] = static_cast<int32_t>(lens[slot][h] - (num_pages - kept) * page_tokens);
      for (; kept < width; ++kept) out_table[r][h][kept] = -1;
    }
  });
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "retrieve(Tensor query, Tensor digests, Tensor table, Tensor lens, Tensor slots, "
      "Tensor dynamic, int page_tokens, float keep_ratio, int sink_pages, int window_pages, "
      "Tensor(a!) out_table, Tensor(b!) out_lens) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("retrieve", &retrieve); }

}  // namespace budgetkv
