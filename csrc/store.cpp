// store and load: copy tokens of a batch to the host blocks of their slots, and from there.
//
// T tokens, H heads, B host blocks of N tokens, D head size, S slots, M blocks of a slot.
// Spec: vllm_budgetkv/ops/reference/store.py and load.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#include "checks.h"

namespace budgetkv {

namespace {

enum class Direction { kStore, kLoad };

template <Direction kDirection>
void move_tokens(const char* name,
                 const at::Tensor& key,             // [T, H, D], mutated by kLoad
                 const at::Tensor& value,           // as key
                 const at::Tensor& slots,           // int32 [R]
                 const at::Tensor& query_start,     // int32 [R + 1]
                 const at::Tensor& first_position,  // int32 [R]
                 const at::Tensor& tokens,          // [B, H, 2, N, D], mutated by kStore
                 const at::Tensor& blocks_in        // int32 [S, M]
) {
  check_last_stride("key", key);
  check_last_stride("value", value);
  check_last_stride("tier.tokens", tokens);
  const auto blocks = blocks_in.accessor<int32_t, 2>();
  const auto position_of = first_position.accessor<int32_t, 1>();
  const BatchRows rows(name, slots, query_start, blocks.size(0), key.size(0));
  const int64_t page_tokens = tokens.size(3), num_heads = tokens.size(1);
  const int64_t item = tokens.element_size(), row_bytes = tokens.size(4) * item;
  char* kept = static_cast<char*>(tokens.data_ptr());
  const at::Tensor* parts[] = {&key, &value};
  for (int64_t row = 0; row < rows.size(); ++row) {
    const int slot = rows.slot(row);
    const int64_t first = position_of[row];
    TORCH_CHECK_INDEX(first >= 0, name, ": row ", row, " begins at position ", first);
    constexpr int64_t kTokensPerTask = 64;
    at::parallel_for(0, rows.num_tokens(row), kTokensPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t position = first + i, entry = position / page_tokens;
        const int64_t block = entry < blocks.size(1) ? blocks[slot][entry] : -1;
        if (block < 0) continue;
        TORCH_CHECK_INDEX(block < tokens.size(0), name, ": slot ", slot, " has block ", block,
                          ", but there are ", tokens.size(0));
        for (int64_t h = 0; h < num_heads; ++h) {
          for (int64_t part = 0; part < 2; ++part) {
            const at::Tensor& batch = *parts[part];
            char* row_data =
                static_cast<char*>(batch.data_ptr()) +
                ((rows.first_token(row) + i) * batch.stride(0) + h * batch.stride(1)) * item;
            char* kept_data =
                kept + (block * tokens.stride(0) + h * tokens.stride(1) + part * tokens.stride(2) +
                        position % page_tokens * tokens.stride(3)) *
                           item;
            if constexpr (kDirection == Direction::kStore) {
              std::memcpy(kept_data, row_data, row_bytes);
            } else {
              std::memcpy(row_data, kept_data, row_bytes);
            }
          }
        }
      }
    });
  }
}

}  // namespace

void store(const at::Tensor& key, const at::Tensor& value, const at::Tensor& slots,
           const at::Tensor& query_start, const at::Tensor& first_position,
           const at::Tensor& tokens, const at::Tensor& blocks) {
  move_tokens<Direction::kStore>("store", key, value, slots, query_start, first_position, tokens,
                                 blocks);
}

void load(const at::Tensor& key, const at::Tensor& value, const at::Tensor& slots,
          const at::Tensor& query_start, const at::Tensor& first_position, const at::Tensor& tokens,
          const at::Tensor& blocks) {
  move_tokens<Direction::kLoad>("load", key, value, slots, query_start, first_position, tokens,
                                blocks);
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "store(Tensor key, Tensor value, Tensor slots, Tensor query_start, Tensor first_position, "
      "Tensor(a!) tokens, Tensor blocks) -> ()");
  m.def(
      "load(Tensor(a!) key, Tensor(b!) value, Tensor slots, Tensor query_start, "
      "Tensor first_position, Tensor tokens, Tensor blocks) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) {
  m.impl("store", &store);
  m.impl("load", &load);
}

}  // namespace budgetkv
