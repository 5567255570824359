// Numbers as 8-bit floats, kLanes at a time. See quantise.h.

template <class T>
static void quantise_row_as(const void* from, int64_t size, float unit, void* to) {
  const T* numbers = static_cast<const T*>(from);
  Fp8* quantised = static_cast<Fp8*>(to);
  for_each_vector(static_cast<int>(size), [&](int i, bool is_tail) {
    store(quantised + i, load(numbers + i, is_tail) / unit, is_tail);
  });
}

void quantise_row(FloatType type, const void* from, int64_t size, float unit, void* to) {
  BUDGETKV_FOR_FLOAT_TYPE(type, quantise_row_as, from, size, unit, to);
}
