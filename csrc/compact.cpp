// compact: survivors of every head move to the front, in order; the pages behind them are freed.
//
// H heads, n tokens, W table width, P pages, N tokens of a page, D head size, F stack capacity.
// Spec: vllm_budgetkv/ops/reference/compact.py. Moves are exact: the result is equal bit for bit.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <vector>

#include "tables.h"

namespace budgetkv {
namespace {

// One field of the head-page struct, addressed by page and slot; `token_bytes` for each token.
struct TokenField {
  explicit TokenField(const at::Tensor& field)  // [P, N, ...], a view into the pages
      : data(static_cast<char*>(field.mutable_data_ptr())),
        page_bytes(field.stride(0) * field.itemsize()),
        token_bytes(field.stride(1) * field.itemsize()) {}
  char* at(int64_t page, int64_t offset) const {
    return data + page * page_bytes + offset * token_bytes;
  }
  char* data;
  int64_t page_bytes, token_bytes;
};

struct Pages {
  Pages(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& positions,
        const at::Tensor& digests)
      : keys(keys),
        values(values),
        positions(positions),
        digests(digests),
        dtype(keys.scalar_type()),
        digest_dtype(digests.scalar_type()),
        page_tokens(keys.size(1)),
        head_size(keys.size(2)) {}
  TokenField keys, values, positions, digests;
  at::ScalarType dtype, digest_dtype;
  int64_t page_tokens, head_size;
};

using TableRow = at::TensorAccessor<int32_t, 1>;

// Moves runs of survivors that stay within one page on both sides. A target never lies behind its
// source, so moving in order is safe, and memmove covers the overlap within a page.
void move_survivors(const bool* keep, int64_t num_tokens, const TableRow& table,
                    const Pages& pages) {
  const int64_t n = pages.page_tokens;
  const std::array<const TokenField*, 3> fields = {&pages.keys, &pages.values, &pages.positions};
  int64_t source = std::find(keep, keep + num_tokens, false) - keep;
  int64_t target = source;
  while (source < num_tokens) {
    if (!keep[source]) {
      ++source;
      continue;
    }
    const int64_t limit = std::min({num_tokens - source, n - source % n, n - target % n});
    const int64_t run = std::find(keep + source, keep + source + limit, false) - (keep + source);
    for (const TokenField* field : fields) {
      std::memmove(field->at(table[target / n], target % n),
                   field->at(table[source / n], source % n), run * field->token_bytes);
    }
    source += run;
    target += run;
  }
}

void fill_nan(char* data, int64_t count, at::ScalarType dtype) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (dtype == at::kFloat) {
    std::fill_n(reinterpret_cast<float*>(data), count, nan);
  } else if (dtype == at::kBFloat16) {
    std::fill_n(reinterpret_cast<c10::BFloat16*>(data), count, c10::BFloat16(nan));
  } else if (dtype == at::kFloat8_e4m3fn) {
    std::fill_n(reinterpret_cast<c10::Float8_e4m3fn*>(data), count, c10::Float8_e4m3fn(nan));
  } else {
    std::fill_n(reinterpret_cast<c10::Half*>(data), count, c10::Half(nan));
  }
}

void poison_slots(const Pages& pages, int64_t page, int64_t begin) {
  const int64_t count = pages.page_tokens - begin;
  fill_nan(pages.keys.at(page, begin), count * pages.head_size, pages.dtype);
  fill_nan(pages.values.at(page, begin), count * pages.head_size, pages.dtype);
  auto* positions = reinterpret_cast<int32_t*>(pages.positions.at(page, begin));
  std::fill_n(positions, count, std::numeric_limits<int32_t>::max());
}

void poison_page(const Pages& pages, int64_t page) {
  poison_slots(pages, page, 0);
  fill_nan(pages.digests.at(page, 0), 2 * pages.head_size, pages.digest_dtype);
}

// Everything that could go wrong, before anything is moved. Returns the survivors of each head.
std::vector<int64_t> count_survivors(const at::Tensor& keep,
                                     const at::TensorAccessor<int32_t, 2>& table,
                                     const at::TensorAccessor<int32_t, 1>& lens, int64_t pool_pages,
                                     int64_t page_tokens, int64_t stack_room) {
  const bool* keep_data = keep.const_data_ptr<bool>();
  std::vector<int64_t> survivors(lens.size(0));
  int64_t num_freed = 0;
  for (int64_t h = 0; h < lens.size(0); ++h) {
    TORCH_CHECK_VALUE(lens[h] <= keep.size(1), "head ", h, " holds ", lens[h],
                      " tokens but keep covers ", keep.size(1));
    check_head(table[h], lens[h], page_tokens, pool_pages);
    const bool* row = keep_data + h * keep.size(1);
    survivors[h] = std::count(row, row + lens[h], true);
    num_freed += ceil_div(lens[h], page_tokens) - ceil_div(survivors[h], page_tokens);
  }
  TORCH_CHECK_VALUE(num_freed <= stack_room, num_freed,
                    " pages are freed but the free stack has room for ", stack_room);
  return survivors;
}

}  // namespace

void compact(const at::Tensor& keep_in,  // bool [H, n]
             const at::Tensor& keys,     // [P, N, D], as values
             const at::Tensor& values,
             const at::Tensor& positions,   // int32 [P, N]
             const at::Tensor& digests,     // [P, 2, D]
             const at::Tensor& table_in,    // int32 [H, W]
             const at::Tensor& lens_in,     // int32 [H]
             const at::Tensor& free_pages,  // int32 [F]
             const at::Tensor& num_free,    // int32 [1]
             bool poison) {
  const at::Tensor keep = keep_in.contiguous();
  const Pages pages(keys, values, positions, digests);
  auto table = table_in.accessor<int32_t, 2>();
  auto lens = lens_in.accessor<int32_t, 1>();
  auto stack = free_pages.accessor<int32_t, 1>();
  int32_t& height = *num_free.mutable_data_ptr<int32_t>();
  const int64_t num_heads = lens.size(0), num_tokens = keep.size(1), n = pages.page_tokens;
  const auto survivors =
      count_survivors(keep, table, lens, keys.size(0), n, stack.size(0) - height);

  at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const bool* row = keep.const_data_ptr<bool>() + h * num_tokens;
      move_survivors(row, lens[h], table[h], pages);
      const int64_t tail = survivors[h] % n;
      if (poison && tail) poison_slots(pages, table[h][survivors[h] / n], tail);
    }
  });
  for (int64_t h = 0; h < num_heads; ++h) {
    for (int64_t j = ceil_div(survivors[h], n); j < ceil_div(lens[h], n); ++j) {
      if (poison) poison_page(pages, table[h][j]);
      stack[height++] = table[h][j];
      table[h][j] = -1;
    }
    lens[h] = static_cast<int32_t>(survivors[h]);
  }
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "compact(Tensor keep, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
      "Tensor(d!) digests, Tensor(e!) table, Tensor(f!) lens, Tensor(g!) free_pages, "
      "Tensor(h!) num_free, bool poison) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("compact", &compact); }

}  // namespace budgetkv
