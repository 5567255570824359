// attend: plans tiles and splits, and lets the threads take them from one queue.
#include "attend.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "checks.h"

namespace budgetkv {
namespace {

// The cut of the keys depends on the request alone, so a request's result does not depend on what
// else is in the batch, nor on the number of threads.
constexpr int kDecodeSplitKeys = 1024;
constexpr int kPrefillSplitKeys = 4096;

// The functions that attend to prompts; decode is always `BUDGETKV_PICK`'s.
struct Kernel {
  int tile_queries;
  int64_t scratch_floats;
  bool (*split)(const AttendArgs&, const AttendTile&, int split, float* scratch);
};

Kernel prefill_kernel(const AttendArgs& args) {
#if defined(__x86_64__)
  // its softmax takes the largest product for the largest score, and bends none
  if (args.type == FloatType::kBfloat16 && args.key_type == args.type &&
      current_isa() == Isa::kAmx && args.scale >= 0 && args.soft_cap == 0) {
    return {amx::attend_tile_queries(), amx::attend_scratch_floats(args.head_size),
            &amx::attend_split};
  }
#endif
  return {BUDGETKV_PICK(attend_tile_queries)(),
          BUDGETKV_PICK(attend_scratch_floats)(args.head_size), BUDGETKV_PICK(attend_split)};
}

struct Plan {
  std::vector<AttendTile> tiles;
  std::vector<std::pair<int, int>> splits;  // tile, split
  int64_t partial_floats = 0;
};

// The tiles of one batch row and KV head. `tile.first_visible` counts for the row's first token.
void plan_head(Plan& plan, AttendTile tile, int num_tokens, int group, int head_size,
               int tile_queries) {
  const int num_queries = num_tokens * group;
  tile.is_decode = num_tokens == 1 && group <= kMaxDecodeGroup;
  tile.split_keys = tile.is_decode ? kDecodeSplitKeys : kPrefillSplitKeys;
  const int step = tile.is_decode ? num_queries : tile_queries;
  // Last tile first: it sees the most keys, and the longest work should start earliest.
  for (int first = (num_queries - 1) / step * step; first >= 0; first -= step) {
    tile.first_query = first;
    tile.num_queries = std::min(step, num_queries - first);
    const int keys = tile.visible(tile.num_queries - 1, group);
    tile.num_splits = std::max(1, (keys + tile.split_keys - 1) / tile.split_keys);
    for (int split = 0; split < tile.num_splits; ++split) {
      plan.splits.emplace_back(static_cast<int>(plan.tiles.size()), split);
    }
    plan.tiles.push_back(tile);
    if (tile.num_splits > 1) {
      plan.partial_floats += int64_t{1} * tile.num_splits * tile.num_queries * (head_size + 2);
    }
  }
}

// Calls `work(index, scratch)` for each index below `count`; idle threads take the next one.
template <class Work>
void run_queue(int64_t count, int64_t scratch_floats, const Work& work) {
  const int64_t num_threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch(scratch_floats, kScratchAlignment);
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) work(i, scratch.data());
    }
  });
}

void run(const AttendArgs& args, const Kernel& prefill, Plan& plan) {
  const AlignedFloats partials(plan.partial_floats, kScratchAlignment);
  float* next = partials.data();
  std::vector<int> to_combine;
  for (size_t i = 0; i < plan.tiles.size(); ++i) {
    AttendTile& tile = plan.tiles[i];
    if (tile.num_splits == 1) continue;
    tile.partials = next;
    next += int64_t{1} * tile.num_splits * tile.num_queries * (args.head_size + 2);
    to_combine.push_back(static_cast<int>(i));
  }
  const int64_t scratch_floats =
      std::max(prefill.scratch_floats, BUDGETKV_PICK(attend_scratch_floats)(args.head_size));
  const auto decode_kernel = BUDGETKV_PICK(attend_split);
  const auto combine_kernel = BUDGETKV_PICK(attend_combine);
  std::atomic<bool> found{true};
  run_queue(plan.splits.size(), scratch_floats, [&](int64_t i, float* scratch) {
    const auto [index, split] = plan.splits[i];
    const AttendTile& tile = plan.tiles[index];
    const auto kernel = tile.is_decode ? decode_kernel : prefill.split;
    if (!kernel(args, tile, split, scratch)) found = false;
  });
  TORCH_CHECK_INDEX(found, "attend: the page table of a row holds a page id outside the pool of ",
                    args.num_pages, " pages within the tokens that lens counts");
  run_queue(to_combine.size(), scratch_floats, [&](int64_t i, float* scratch) {
    combine_kernel(args, plan.tiles[to_combine[i]], scratch);
  });
}

AttendArgs make_args(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                     const at::Tensor& table, const at::Tensor& out, double scale, double soft_cap,
                     const std::optional<at::Tensor>& sinks, double value_unit) {
  check_pool_field("keys", keys);
  check_pool_field("values", values);
  check_last_stride("query", query);
  check_last_stride("out", out);
  AttendArgs args{};
  args.type = float_type(query.scalar_type());
  args.key_type = float_type(keys.scalar_type());
  args.query = query.const_data_ptr();
  args.query_token_stride = query.stride(0);
  args.query_head_stride = query.stride(1);
  args.out = out.mutable_data_ptr();
  args.out_token_stride = out.stride(0);
  args.out_head_stride = out.stride(1);
  args.keys = keys.const_data_ptr();
  args.values = values.const_data_ptr();
  args.page_stride = keys.stride(0);
  args.num_pages = keys.size(0);
  args.page_tokens = static_cast<int>(keys.size(1));
  args.head_size = static_cast<int>(keys.size(2));
  args.group = static_cast<int>(query.size(1) / table.size(1));
  args.num_query_heads = static_cast<int>(query.size(1));
  args.scale = static_cast<float>(scale);
  args.soft_cap = static_cast<float>(soft_cap);
  args.value_unit = static_cast<float>(value_unit);
  args.sinks = sinks.has_value() ? sinks->const_data_ptr<float>() : nullptr;
  return args;
}

// Tiles take the first and the last of their tokens for those that see the fewest and the most.
void check_ahead(const char* op, int64_t row, const int32_t* ahead, int num_tokens) {
  if (ahead == nullptr) return;
  for (int token = 0; token < num_tokens; ++token) {
    const bool is_inside = ahead[token] >= 0 && token + ahead[token] < num_tokens;
    TORCH_CHECK_INDEX(is_inside && (token == 0 || ahead[token] >= ahead[token - 1] - 1), op,
                      ": token ", token, " of row ", row, " sees ", ahead[token],
                      " tokens ahead, but the row has ", num_tokens - 1 - token,
                      " more, and no token sees less far than the one in front of it");
  }
}

// The tiles of all rows. With `first_position`, heads hold the tokens of their requests from
// `first_token` on; without, whatever they hold, the row's own last. `ahead` may be null.
void attend_rows(const char* op, const AttendArgs& args, const at::Tensor& table,
                 const at::Tensor& lens, const BatchRows& rows, const int32_t* first_position,
                 int64_t first_token, const int32_t* ahead) {
  const auto table_of = table.accessor<int32_t, 3>();
  const auto lens_of = lens.accessor<int32_t, 2>();
  check_last_stride("table", table);
  const Kernel prefill = prefill_kernel(args);
  Plan plan;
  for (int64_t row = 0; row < rows.size(); ++row) {
    const int num_tokens = rows.num_tokens(row);
    if (num_tokens == 0) continue;
    const int slot = rows.slot(row);
    const int32_t* ahead_of_row = ahead == nullptr ? nullptr : ahead + rows.first_token(row);
    check_ahead(op, row, ahead_of_row, num_tokens);
    for (int head = 0; head < table.size(1); ++head) {
      const int num_keys = lens_of[slot][head];
      TORCH_CHECK_INDEX(num_keys >= 0 && num_keys <= table.size(2) * args.page_tokens, op,
                        ": slot ", slot, " head ", head, " has ", num_keys,
                        " tokens, but its table has room for ", table.size(2), " pages of ",
                        args.page_tokens);
      AttendTile tile{};
      tile.pages = table_of[slot][head].data();
      tile.first_token = rows.first_token(row);
      tile.kv_head = head;
      tile.num_keys = num_keys;
      tile.ahead = ahead_of_row;
      tile.first_visible = first_position == nullptr
                               ? num_keys - num_tokens + 1
                               : static_cast<int>(first_position[row] + 1 - first_token);
      plan_head(plan, tile, num_tokens, args.group, args.head_size, prefill.tile_queries);
    }
  }
  run(args, prefill, plan);
}

void attend(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
            const at::Tensor& table, const at::Tensor& lens, const at::Tensor& slots,
            const at::Tensor& query_start, const at::Tensor& out, double scale, double soft_cap,
            const std::optional<at::Tensor>& sinks_in,  // float32 [Hq]
            double value_unit, const std::optional<at::Tensor>& ahead) {
  std::optional<at::Tensor> sinks = sinks_in;
  if (sinks.has_value()) sinks = sinks->contiguous();
  const AttendArgs args =
      make_args(query, keys, values, table, out, scale, soft_cap, sinks, value_unit);
  const BatchRows rows("attend", slots, query_start, table.size(0), query.size(0));
  TORCH_CHECK_VALUE(!ahead.has_value() || ahead->is_contiguous(),
                    "attend: ahead must be contiguous");
  attend_rows("attend", args, table, lens, rows, nullptr, 0,
              ahead.has_value() ? ahead->const_data_ptr<int32_t>() : nullptr);
}

void attend_part(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                 const at::Tensor& table, const at::Tensor& lens, const at::Tensor& slots,
                 const at::Tensor& query_start, const at::Tensor& first_position,
                 int64_t first_token, const at::Tensor& out, const at::Tensor& lse, double scale) {
  AttendArgs args = make_args(query, keys, values, table, out, scale, 0.0, std::nullopt, 1.0);
  TORCH_CHECK_VALUE(lse.is_contiguous() && first_position.is_contiguous(),
                    "attend_part: lse and first_position must be contiguous");
  args.lse = lse.mutable_data_ptr<float>();
  const BatchRows rows("attend_part", slots, query_start, table.size(0), query.size(0));
  attend_rows("attend_part", args, table, lens, rows, first_position.const_data_ptr<int32_t>(),
              first_token, nullptr);
}

}  // namespace
}  // namespace budgetkv

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "attend(Tensor query, Tensor keys, Tensor values, Tensor table, Tensor lens, Tensor slots, "
      "Tensor query_start, Tensor(a!) out, float scale, float soft_cap, Tensor? sinks, float "
      "value_unit, Tensor? ahead) -> ()");
  m.def(
      "attend_part(Tensor query, Tensor keys, Tensor values, Tensor table, Tensor lens, "
      "Tensor slots, Tensor query_start, Tensor first_position, int first_token, Tensor(a!) out, "
      "Tensor(b!) lse, float scale) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) {
  m.impl("attend", &budgetkv::attend);
  m.impl("attend_part", &budgetkv::attend_part);
}
