// score: probe attention per token, top-k mass per query head, value norms, positions.
//
// M probe rows, H heads, G query heads per KV head, D head size, W table width, P pages,
// N tokens of a page, n width of the result. Spec: vllm_budgetkv/ops/reference/score.py.
#include "score.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numbers>
#include <optional>
#include <vector>

#include "tables.h"

namespace budgetkv {
namespace {

constexpr float kLog2E = std::numbers::log2e_v<float>;

struct Head {
  Segment sinks, rest;
  int64_t first_slot = 0;  // of its packed tokens among those of all heads
  int64_t slots() const { return sinks.padded() + rest.padded(); }
  int64_t num_tokens() const { return sinks.num_tokens + rest.num_tokens; }
};

// What is asked of every head.
struct Numbers {
  float scale, soft_cap;  // of the logits, times log2(e)
  const float* sinks;     // [Hq], learned; null for none
  int64_t top_k;
  bool takes_largest;
};

struct BlockOfHead {
  int64_t head, first_token, num_tokens, first_slot;
};

// Copies the positions of one head's tokens; returns how many are sinks. Positions ascend, so the
// sinks come first.
int64_t copy_positions(const at::Tensor& field, const int32_t* table, int64_t num_tokens,
                       int64_t sink_positions, int32_t* positions) {
  const int32_t* data = field.const_data_ptr<int32_t>();
  const int64_t page_tokens = field.size(1);
  for (int64_t first = 0; first < num_tokens; first += page_tokens) {
    const int32_t* page = data + table[first / page_tokens] * field.stride(0);
    std::copy_n(page, std::min(page_tokens, num_tokens - first), positions + first);
  }
  return std::lower_bound(positions, positions + num_tokens, sink_positions) - positions;
}

std::vector<BlockOfHead> blocks_of(const std::vector<Head>& heads) {
  std::vector<BlockOfHead> blocks;
  for (size_t h = 0; h < heads.size(); ++h) {
    int64_t token = 0, slot = heads[h].first_slot;
    for (const Segment& segment : {heads[h].sinks, heads[h].rest}) {
      const int64_t end = token + segment.num_tokens;
      for (; token < end; token += kBlockTokens, slot += kBlockTokens) {
        const int64_t num_tokens = std::min(kBlockTokens, end - token);
        blocks.push_back({static_cast<int64_t>(h), token, num_tokens, slot});
      }
      token = end;
    }
  }
  return blocks;
}

// Fills `packed` [all slots, D] and `norms` [H, n] from the heads' keys and values.
void pack_heads(const std::vector<Head>& heads, const at::Tensor& keys, const at::Tensor& values,
                float value_unit, const at::TensorAccessor<int32_t, 2>& table, float* packed,
                at::Tensor& norms) {
  const auto blocks = blocks_of(heads);
  const auto pack_block = BUDGETKV_PICK(pack_block);
  const int64_t page_tokens = keys.size(1), head_size = keys.size(2);
  constexpr int64_t kBlocksPerTask = 4;
  at::parallel_for(0, blocks.size(), kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [head, first_token, num_tokens, first_slot] = blocks[i];
      pack_block({float_type(keys.scalar_type()), static_cast<const char*>(keys.const_data_ptr()),
                  static_cast<const char*>(values.const_data_ptr()),
                  keys.stride(0) * keys.itemsize(), page_tokens, head_size, value_unit,
                  table[head].data(), first_token, num_tokens, packed + first_slot * head_size,
                  norms.mutable_data_ptr<float>() + head * norms.size(1) + first_token});
    }
  });
}

// Scores every query head: mass summed over rows, or the largest, in `partial`, zeros so far, of
// each KV head [G, slots] from G * first_slot, and the mean top-k mass.
void score_heads(const std::vector<Head>& heads, const at::Tensor& queries,  // [Hq, M, D]
                 const float* packed, const Numbers& numbers, float* partial, float* topk_mass) {
  const int64_t num_queries = queries.size(0), num_rows = queries.size(1);
  const int64_t head_size = queries.size(2), group = num_queries / heads.size();
  const auto score_rows = BUDGETKV_PICK(score_rows);
  // heads are ragged, so the threads take them from one queue
  std::atomic<int64_t> next{0};
  const int64_t num_threads = std::min<int64_t>(at::get_num_threads(), num_queries);
  at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    std::vector<float> logits;
    for (int64_t q = next++; q < num_queries; q = next++) {
      const Head& head = heads[q / group];
      if (head.num_tokens() == 0) continue;
      logits.resize(std::min(kRowTile, num_rows) * head.slots());
      const ScoreTask task{packed + head.first_slot * head_size,
                           head.sinks,
                           head.rest,
                           queries.const_data_ptr<float>() + q * num_rows * head_size,
                           numbers.scale,
                           numbers.soft_cap,
                           numbers.sinks == nullptr ? -std::numeric_limits<float>::infinity()
                                                    : numbers.sinks[q] * kLog2E,
                           num_rows,
                           head_size,
                           numbers.top_k,
                           numbers.takes_largest,
                           logits.data(),
                           partial + head.first_slot * group + q % group * head.slots()};
      topk_mass[q] = score_rows(task) / static_cast<float>(num_rows);
    }
  });
}

// mass of a head = mean over the group of what `partial` [G, slots] sums over `summed_rows`.
void average_mass(const Head& head, const float* partial, int64_t group, int64_t summed_rows,
                  float* mass) {
  const float share = 1.0f / static_cast<float>(group * summed_rows);
  for (int64_t i = 0; i < head.num_tokens(); ++i) {
    const bool is_sink = i < head.sinks.num_tokens;
    const int64_t slot = is_sink ? i : i - head.sinks.num_tokens + head.sinks.padded();
    float sum = 0.0f;
    for (int64_t g = 0; g < group; ++g) sum += partial[g * head.slots() + slot];
    mass[i] = sum * share;
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> score(
    const at::Tensor& probe,  // [M, H * G, D]
    const at::Tensor& keys,   // [P, N, D], as values
    const at::Tensor& values,
    const at::Tensor& positions,  // int32 [P, N]
    const at::Tensor& table_in,   // int32 [H, W]
    const at::Tensor& lens,       // int32 [H]
    double scale, double soft_cap,
    const std::optional<at::Tensor>& learned_sinks,  // float32 [H * G]
    double value_unit, int64_t top_k, int64_t num_sinks, bool takes_largest, int64_t max_tokens) {
  const int64_t num_heads = lens.size(0), group = probe.size(1) / num_heads;
  const at::Tensor table = table_in.contiguous();
  const auto pages = table.accessor<int32_t, 2>();
  const at::Tensor queries = probe.to(at::kFloat).transpose(0, 1).contiguous();

  const auto options = at::TensorOptions().dtype(at::kFloat);
  at::Tensor mass = at::zeros({num_heads, max_tokens}, options);
  at::Tensor topk_mass = at::full({num_heads * group}, 1.0, options);
  at::Tensor norms = at::zeros({num_heads, max_tokens}, options);
  at::Tensor out_positions = at::full({num_heads, max_tokens}, -1, options.dtype(at::kInt));

  std::vector<Head> heads(num_heads);
  int64_t num_slots = 0;
  for (int64_t h = 0; h < num_heads; ++h) {
    const int64_t num_tokens = lens.accessor<int32_t, 1>()[h];
    TORCH_CHECK_VALUE(num_tokens <= max_tokens, "head ", h, " holds ", num_tokens,
                      " tokens but max_tokens is ", max_tokens);
    check_head(pages[h], num_tokens, keys.size(1), keys.size(0));
    int32_t* row = out_positions.mutable_data_ptr<int32_t>() + h * max_tokens;
    const int64_t sinks = copy_positions(positions, pages[h].data(), num_tokens, num_sinks, row);
    heads[h] = {{sinks}, {num_tokens - sinks}, num_slots};
    num_slots += heads[h].slots();
  }

  at::Tensor packed = at::empty({num_slots, probe.size(2)}, options);
  float* packed_data = packed.mutable_data_ptr<float>();
  pack_heads(heads, keys, values, static_cast<float>(value_unit), pages, packed_data, norms);
  at::Tensor partial = at::zeros({num_slots * group}, options);
  const at::Tensor learned = learned_sinks.has_value() ? learned_sinks->contiguous() : at::Tensor();
  const Numbers numbers{static_cast<float>(scale * std::numbers::log2e),
                        static_cast<float>(soft_cap * std::numbers::log2e),
                        learned.defined() ? learned.const_data_ptr<float>() : nullptr, top_k,
                        takes_largest};
  score_heads(heads, queries, packed_data, numbers, partial.mutable_data_ptr<float>(),
              topk_mass.mutable_data_ptr<float>());
  const int64_t summed_rows = takes_largest ? 1 : probe.size(0);
  at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      average_mass(heads[h], partial.const_data_ptr<float>() + heads[h].first_slot * group, group,
                   summed_rows, mass.mutable_data_ptr<float>() + h * max_tokens);
    }
  });
  return {mass, topk_mass, norms, out_positions};
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "score(Tensor probe, Tensor keys, Tensor values, Tensor positions, Tensor table, "
      "Tensor lens, float scale, float soft_cap, Tensor? learned_sinks, float value_unit, "
      "int top_k, int num_sinks, bool takes_largest, int max_tokens) "
      "-> (Tensor mass, Tensor topk_mass, Tensor value_norms, Tensor positions)");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("score", &score); }

}  // namespace budgetkv
