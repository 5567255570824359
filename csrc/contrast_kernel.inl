// Directions of keys, kLanes channels at a time. See contrast.h.

// One over the length of a key; as in torch, a key of zeros has no direction rather than NaN.
template <class T>
BUDGETKV_INLINE float inverse_norm(const T* key, int64_t head_size) {
  Vec squares = Vec{};
  for_each_vector(head_size, [&](int channel, bool is_tail) {
    const Vec element = load(key + channel, is_tail);
    squares += element * element;
  });
  const float norm = __builtin_sqrtf(reduce_add(squares));
  return 1.0f / (norm > 1e-12f ? norm : 1e-12f);
}

template <class T>
static void add_directions_as(const void* page_keys, int64_t num_tokens, int64_t head_size,
                              float* sum) {
  const T* key = static_cast<const T*>(page_keys);
  for (int64_t i = 0; i < num_tokens; ++i, key += head_size) {
    const float factor = inverse_norm(key, head_size);
    for_each_vector(head_size, [&](int channel, bool is_tail) {
      const Vec added = load(sum + channel, is_tail) + load(key + channel, is_tail) * factor;
      store(sum + channel, added, is_tail);
    });
  }
}

void add_directions(FloatType type, const void* keys, int64_t num_tokens, int64_t head_size,
                    float* sum) {
  BUDGETKV_FOR_FLOAT_TYPE(type, add_directions_as, keys, num_tokens, head_size, sum);
}

template <class T>
static void contrast_tokens_as(const void* page_keys, int64_t num_tokens, int64_t head_size,
                               const float* anchor, float* contrasts) {
  const T* key = static_cast<const T*>(page_keys);
  for (int64_t i = 0; i < num_tokens; ++i, key += head_size) {
    Vec products = Vec{};
    for_each_vector(head_size, [&](int channel, bool is_tail) {
      products += load(key + channel, is_tail) * load(anchor + channel, is_tail);
    });
    contrasts[i] = 1.0f - reduce_add(products) * inverse_norm(key, head_size);
  }
}

void contrast_tokens(FloatType type, const void* keys, int64_t num_tokens, int64_t head_size,
                     const float* anchor, float* contrasts) {
  BUDGETKV_FOR_FLOAT_TYPE(type, contrast_tokens_as, keys, num_tokens, head_size, anchor, contrasts);
}
