// Scores of pages for the queries of one row and one KV head.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace budgetkv {

// The query heads of one KV head, against the digests of some of its pages.
struct PageQuery {
  const float* queries;  // [num_queries, head_size]
  int64_t num_queries, head_size;
  FloatType type;  // of the digests
  const char* digests;
  int64_t page_bytes;  // from one page's digest to the next one's
};

BUDGETKV_DECLARE(void score_pages(const PageQuery& query,
                                  const int32_t* pages,  // [num_pages], ids
                                  int64_t num_pages,
                                  float* scores))  // [num_pages], mutated

}  // namespace budgetkv
