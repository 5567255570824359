// store: copies the new tokens of a batch to the host blocks of their slots.
//
// T tokens, H heads, B host blocks of N tokens, D head size, S slots, M blocks of a slot.
// Spec: vllm_budgetkv/ops/reference/store.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#include "checks.h"

namespace budgetkv {

void store(const at::Tensor& key,             // [T, H, D]
           const at::Tensor& value,           // as key
           const at::Tensor& slots,           // int32 [R]
           const at::Tensor& query_start,     // int32 [R + 1]
           const at::Tensor& first_position,  // int32 [R]
           const at::Tensor& tokens,          // [B, H, 2, N, D], mutated
           const at::Tensor& blocks_in        // int32 [S, M]
) {
  check_last_stride("key", key);
  check_last_stride("value", value);
  check_last_stride("tier.tokens", tokens);
  const auto blocks = blocks_in.accessor<int32_t, 2>();
  const auto position_of = first_position.accessor<int32_t, 1>();
  const BatchRows rows("store", slots, query_start, blocks.size(0), key.size(0));
  const int64_t page_tokens = tokens.size(3), num_heads = tokens.size(1);
  const int64_t item = tokens.element_size(), row_bytes = tokens.size(4) * item;
  char* to = static_cast<char*>(tokens.mutable_data_ptr());
  const at::Tensor* sources[] = {&key, &value};
  for (int64_t row = 0; row < rows.size(); ++row) {
    const int slot = rows.slot(row);
    const int64_t first = position_of[row];
    TORCH_CHECK_INDEX(first >= 0, "store: row ", row, " begins at position ", first);
    constexpr int64_t kTokensPerTask = 64;
    at::parallel_for(0, rows.num_tokens(row), kTokensPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t position = first + i, entry = position / page_tokens;
        const int64_t block = entry < blocks.size(1) ? blocks[slot][entry] : -1;
        if (block < 0) continue;
        TORCH_CHECK_INDEX(block < tokens.size(0), "store: slot ", slot, " has block ", block,
                          ", but there are ", tokens.size(0));
        for (int64_t h = 0; h < num_heads; ++h) {
          for (int64_t part = 0; part < 2; ++part) {
            const at::Tensor& source = *sources[part];
            const int64_t from =
                (rows.first_token(row) + i) * source.stride(0) + h * source.stride(1);
            const int64_t place = block * tokens.stride(0) + h * tokens.stride(1) +
                                  part * tokens.stride(2) +
                                  position % page_tokens * tokens.stride(3);
            std::memcpy(to + place * item,
                        static_cast<const char*>(source.const_data_ptr()) + from * item, row_bytes);
          }
        }
      }
    });
  }
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "store(Tensor key, Tensor value, Tensor slots, Tensor query_start, Tensor first_position, "
      "Tensor(a!) tokens, Tensor blocks) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("store", &store); }

}  // namespace budgetkv
