// The tables of one layer, checked: a wrong entry must end in an error, not in a read or write
// outside of the pool.
#pragma once

#include "checks.h"

namespace budgetkv {

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class Row>
void check_head(const Row& pages, int64_t num_tokens, int64_t page_tokens, int64_t pool_pages) {
  const int64_t held_pages = ceil_div(num_tokens, page_tokens);
  TORCH_CHECK_VALUE(num_tokens >= 0 && held_pages <= pages.size(0), "a head holds ", num_tokens,
                    " tokens, but its table has room for ", pages.size(0), " pages of ",
                    page_tokens);
  for (int64_t j = 0; j < held_pages; ++j) {
    TORCH_CHECK_INDEX(pages[j] >= 0 && pages[j] < pool_pages, "entry ", j, " of a head is page ",
                      pages[j], ", but the pool has ", pool_pages);
  }
}

}  // namespace budgetkv
