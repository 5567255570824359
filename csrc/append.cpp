// append: first takes the pages in order, then copies tokens in parallel. reserve: the pages alone.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "checks.h"

namespace budgetkv {
namespace {

constexpr int64_t kTokensPerThread = 64;

// One head of one batch row.
struct HeadWrite {
  const int32_t* pages;
  int head;
  int first_slot;       // tokens that the head holds already
  int64_t first_token;  // of the row, in key and value
  int num_tokens;
  int first_position;
};

struct Tables {
  at::TensorAccessor<int32_t, 3> table;
  at::TensorAccessor<int32_t, 2> lens;
  at::TensorAccessor<int32_t, 2> free_pages;
  at::TensorAccessor<int32_t, 1> num_free;
  int page_tokens;
  int64_t num_pages;
};

// Pops the pages that the head will need and enters them in its table.
void take_pages(const char* op, Tables& tables, int slot, int head, int first_page, int end_page) {
  const int wanted = end_page - first_page;
  TORCH_CHECK(wanted <= tables.num_free[slot], op, ": slot ", slot, " head ", head, " wants ",
              wanted, " pages, but ", tables.num_free[slot],
              " are free: compress the request before it grows, or raise its quota");
  for (int page = first_page; page < end_page; ++page) {
    tables.table[slot][head][page] = tables.free_pages[slot][--tables.num_free[slot]];
  }
}

HeadWrite plan_head(Tables& tables, int slot, int head, int num_tokens, bool shared) {
  int32_t& held = tables.lens[slot][head];
  const int end = held + num_tokens;
  const int first_new = (held + tables.page_tokens - 1) / tables.page_tokens;
  const int end_page = (end + tables.page_tokens - 1) / tables.page_tokens;
  TORCH_CHECK_INDEX(end_page <= tables.table.size(2), "append: slot ", slot, " head ", head,
                    " needs ", end_page, " pages for ", end, " tokens, but its table is ",
                    tables.table.size(2), " wide");
  if (shared) take_pages("append", tables, slot, head, first_new, end_page);
  for (int page = held / tables.page_tokens; page < end_page; ++page) {
    const int32_t id = tables.table[slot][head][page];
    TORCH_CHECK_INDEX(id >= 0 && id < tables.num_pages, "append: entry ", page, " of slot ", slot,
                      " head ", head, " is page ", id, ", but the pool has ", tables.num_pages);
  }
  HeadWrite write{};
  write.pages = tables.table[slot][head].data();
  write.head = head;
  write.first_slot = held;
  write.num_tokens = num_tokens;
  held = end;
  return write;
}

std::vector<HeadWrite> plan(Tables& tables, const BatchRows& rows, const at::Tensor& first_position,
                            const at::Tensor& shared) {
  const auto position_of = first_position.accessor<int32_t, 1>();
  const auto shared_of = shared.accessor<bool, 1>();
  std::vector<HeadWrite> writes;
  for (int64_t row = 0; row < rows.size(); ++row) {
    if (rows.num_tokens(row) == 0) continue;
    const int slot = rows.slot(row);
    for (int head = 0; head < tables.table.size(1); ++head) {
      HeadWrite write = plan_head(tables, slot, head, rows.num_tokens(row), shared_of[row]);
      write.first_token = rows.first_token(row);
      write.first_position = position_of[row];
      writes.push_back(write);
    }
  }
  return writes;
}

// A field of the pool, or the new tokens, in bytes.
struct Field {
  explicit Field(const at::Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        outer(tensor.stride(0) * tensor.element_size()),
        inner(tensor.stride(1) * tensor.element_size()) {}
  char* at(int64_t i, int64_t j) const { return data + i * outer + j * inner; }
  char* data;
  int64_t outer, inner;
};

void append(const at::Tensor& key, const at::Tensor& value, const at::Tensor& keys,
            const at::Tensor& values, const at::Tensor& positions, const at::Tensor& table,
            const at::Tensor& lens, const at::Tensor& free_pages, const at::Tensor& num_free,
            const at::Tensor& slots, const at::Tensor& query_start,
            const at::Tensor& first_position, const at::Tensor& shared) {
  check_pool_field("keys", keys);
  check_pool_field("values", values);
  check_last_stride("key", key);
  check_last_stride("value", value);
  check_last_stride("table", table);
  const int page_tokens = static_cast<int>(keys.size(1));
  Tables tables{table.accessor<int32_t, 3>(),
                lens.accessor<int32_t, 2>(),
                free_pages.accessor<int32_t, 2>(),
                num_free.accessor<int32_t, 1>(),
                page_tokens,
                keys.size(0)};
  const BatchRows rows("append", slots, query_start, table.size(0), key.size(0));
  const std::vector<HeadWrite> writes = plan(tables, rows, first_position, shared);

  const Field from_key(key), from_value(value);
  const Field to_key(keys), to_value(values), to_position(positions);
  const int64_t row_bytes = keys.size(2) * keys.element_size();
  // a decode step writes a few tokens: waking a thread would cost more than copying them
  const int64_t num_writes = writes.size();
  const int64_t grain = key.size(0) < kTokensPerThread ? num_writes : 1;
  at::parallel_for(0, num_writes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const HeadWrite& write = writes[w];
      for (int i = 0; i < write.num_tokens; ++i) {
        const int64_t page = write.pages[(write.first_slot + i) / page_tokens];
        const int in_page = (write.first_slot + i) % page_tokens;
        const int64_t token = write.first_token + i;
        const int32_t position = write.first_position + i;
        std::memcpy(to_key.at(page, in_page), from_key.at(token, write.head), row_bytes);
        std::memcpy(to_value.at(page, in_page), from_value.at(token, write.head), row_bytes);
        std::memcpy(to_position.at(page, in_page), &position, sizeof(position));
      }
    }
  });
}

void reserve(const at::Tensor& table, const at::Tensor& lens, const at::Tensor& free_pages,
             const at::Tensor& num_free, const at::Tensor& slots, const at::Tensor& shared,
             int64_t page_tokens) {
  check_last_stride("table", table);
  Tables tables{table.accessor<int32_t, 3>(),      lens.accessor<int32_t, 2>(),
                free_pages.accessor<int32_t, 2>(), num_free.accessor<int32_t, 1>(),
                static_cast<int>(page_tokens),     0};
  const auto slot_of = slots.accessor<int32_t, 1>();
  const auto shared_of = shared.accessor<bool, 1>();
  for (int64_t row = 0; row < slots.size(0); ++row) {
    if (!shared_of[row]) continue;
    const int slot = slot_of[row];
    TORCH_CHECK_INDEX(slot >= 0 && slot < table.size(0), "reserve: row ", row, " is in slot ", slot,
                      ", but there are ", table.size(0), " slots");
    for (int head = 0; head < table.size(1); ++head) {
      const int held = tables.lens[slot][head];
      if (held % tables.page_tokens != 0) continue;
      const int page = held / tables.page_tokens;
      TORCH_CHECK_INDEX(page < table.size(2), "reserve: slot ", slot, " head ", head, " holds ",
                        held, " tokens, but its table is ", table.size(2), " pages wide");
      take_pages("reserve", tables, slot, head, page, page + 1);
    }
  }
}

}  // namespace
}  // namespace budgetkv

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "append(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
      "Tensor(d!) table, Tensor(e!) lens, Tensor free_pages, Tensor(f!) num_free, Tensor slots, "
      "Tensor query_start, Tensor first_position, Tensor shared) -> ()");
  m.def(
      "reserve(Tensor(a!) table, Tensor lens, Tensor free_pages, Tensor(b!) num_free, "
      "Tensor slots, Tensor shared, int page_tokens) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) {
  m.impl("append", &budgetkv::append);
  m.impl("reserve", &budgetkv::reserve);
}
