// Centre and radius of a page, kLanes channels at a time. See digest.h.

BUDGETKV_INLINE Vec magnitude(Vec x) { return bitcast<Vec>(bitcast<Int>(x) & 0x7fffffff); }

template <class T>
static void digest_page_as(const void* page_keys, int64_t num_tokens, int64_t head_size,
                           FloatType digest_type, void* digest) {
  const T* keys = static_cast<const T*>(page_keys);
  for_each_vector(head_size, [&](int channel, bool is_tail) {
    const T* column = keys + channel;
    Vec highest = load(column, is_tail), lowest = highest;
    for (int64_t i = 1; i < num_tokens; ++i) {
      const Vec key = load(column + i * head_size, is_tail);
      highest = max(highest, key);
      lowest = min(lowest, key);
    }
    const Vec centre = (highest + lowest) * 0.5f;
    Vec deviation = Vec{};
    for (int64_t i = 0; i < num_tokens; ++i) {
      deviation += magnitude(load(column + i * head_size, is_tail) - centre);
    }
    const Vec radius = deviation / static_cast<float>(num_tokens);
    store_as(digest_type, digest, channel, centre, is_tail);
    store_as(digest_type, digest, head_size + channel, radius, is_tail);
  });
}

void digest_page(FloatType key_type, const void* keys, int64_t num_tokens, int64_t head_size,
                 FloatType digest_type, void* digest) {
  BUDGETKV_FOR_FLOAT_TYPE(key_type, digest_page_as, keys, num_tokens, head_size, digest_type,
                          digest);
}
