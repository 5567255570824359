// The largest q.k in the box of each page, for the best of the group's queries. See retrieve.h.

template <class T>
static void score_pages_as(const PageQuery& query, const int32_t* pages, int64_t num_pages,
                           float* scores) {
  const int64_t size = query.head_size;
  for (int64_t j = 0; j < num_pages; ++j) {
    const T* centre = reinterpret_cast<const T*>(query.digests + pages[j] * query.page_bytes);
    const T* radius = centre + size;
    float best = -__builtin_inff();
    for (int64_t g = 0; g < query.num_queries; ++g) {
      const float* q = query.queries + g * size;
      Vec sum = Vec{};
      for_each_vector(size, [&](int i, bool is_tail) {
        const Vec channel = load(q + i, is_tail);
        sum += channel * load(centre + i, is_tail);
        sum += magnitude(channel) * load(radius + i, is_tail);
      });
      const float score = reduce_add(sum);
      best = score > best ? score : best;
    }
    scores[j] = best;
  }
}

void score_pages(const PageQuery& query, const int32_t* pages, int64_t num_pages, float* scores) {
  BUDGETKV_FOR_FLOAT_TYPE(query.type, score_pages_as, query, pages, num_pages, scores);
}
