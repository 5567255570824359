// Vectors of BUDGETKV_LANES floats, written once with GCC's vector extensions.
//
// Include this inside the namespace of an instruction set, after `#pragma GCC target`; there is no
// include guard, because each namespace needs its own copy. All functions are inlined by force,
// so that none is ever shared between instruction sets. Needs <cstdint>, <cstring> and <utility>
// (and <immintrin.h> on x86), included before the pragma.

#define BUDGETKV_INLINE static inline __attribute__((always_inline))

constexpr int kLanes = BUDGETKV_LANES;

typedef float Vec __attribute__((vector_size(4 * BUDGETKV_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * BUDGETKV_LANES)));
typedef uint32_t Uint __attribute__((vector_size(4 * BUDGETKV_LANES)));
typedef uint16_t Short __attribute__((vector_size(2 * BUDGETKV_LANES)));
typedef uint8_t Byte __attribute__((vector_size(BUDGETKV_LANES)));

// Floats of 16 and of 8 bits as they lie in memory; `Bits` is a vector of them.
struct Bf16 {
  typedef Short Bits;
  uint16_t bits;
};
struct Fp16 {
  typedef Short Bits;
  uint16_t bits;
};
struct Fp8 {  // 4 bits of exponent, 3 of mantissa, no infinity
  typedef Byte Bits;
  uint8_t bits;
};

template <class To, class From>
BUDGETKV_INLINE To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

BUDGETKV_INLINE Vec splat(float x) { return Vec{} + x; }
BUDGETKV_INLINE Vec select(Int mask, Vec yes, Vec no) {
  return bitcast<Vec>((bitcast<Int>(yes) & mask) | (bitcast<Int>(no) & ~mask));
}
BUDGETKV_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
BUDGETKV_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

// 0, 1, 2, ...
BUDGETKV_INLINE Int lane_index() {
  Int index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

// ---- 16-bit floats -------------------------------------------------------------------------

BUDGETKV_INLINE Vec widen(Bf16, Short bits) {
  return bitcast<Vec>(__builtin_convertvector(bits, Uint) << 16);
}

BUDGETKV_INLINE Short narrow(Bf16, Vec x) {
  const Uint bits = bitcast<Uint>(x);
  const Uint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Uint quiet_nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(
      bitcast<Uint>(select(x == x, bitcast<Vec>(rounded), bitcast<Vec>(quiet_nan))), Short);
}

#if BUDGETKV_LANES == 16
BUDGETKV_INLINE Vec widen(Fp16, Short bits) { return _mm512_cvtph_ps(bitcast<__m256i>(bits)); }
BUDGETKV_INLINE Short narrow(Fp16, Vec x) {
  return bitcast<Short>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif BUDGETKV_LANES == 8
BUDGETKV_INLINE Vec widen(Fp16, Short bits) { return _mm256_cvtph_ps(bitcast<__m128i>(bits)); }
BUDGETKV_INLINE Short narrow(Fp16, Vec x) {
  return bitcast<Short>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
BUDGETKV_INLINE Vec widen(Fp16, Short bits) {
  const Uint half = __builtin_convertvector(bits, Uint);
  const Uint magnitude = (half & 0x7fff) << 13;
  // The factor moves the exponent bias from 15 to 127, and normalises subnormal halves.
  const Vec finite = bitcast<Vec>(magnitude) * 0x1p112f;
  const Vec special = bitcast<Vec>(magnitude | 0x7f800000);
  const Vec result = select((half & 0x7c00) == 0x7c00, special, finite);
  return bitcast<Vec>(bitcast<Uint>(result) | (half & 0x8000) << 16);
}
BUDGETKV_INLINE Short narrow(Fp16, Vec x) {
  const Uint bits = bitcast<Uint>(x);
  const Uint magnitude = bits & 0x7fffffff;
  const Uint normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 rounds a subnormal half into the low bits of the sum.
  const Uint subnormal = bitcast<Uint>(bitcast<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const Uint overflow = bitcast<Uint>(
      select(magnitude > 0x7f800000, bitcast<Vec>(Uint{} + 0x7e00), bitcast<Vec>(Uint{} + 0x7c00)));
  Vec half = select(magnitude < 0x38800000, bitcast<Vec>(subnormal), bitcast<Vec>(normal));
  half = select(magnitude >= 0x47800000, bitcast<Vec>(overflow), half);
  return __builtin_convertvector(bitcast<Uint>(half) | (bits >> 16 & 0x8000), Short);
}
#endif

// ---- 8-bit floats --------------------------------------------------------------------------

#if BUDGETKV_LANES >= 8
// By way of 16 bits, whose exponent has one bit more in front and a bias of 15 in place of 7.
BUDGETKV_INLINE Vec widen(Fp8, Byte bytes) {
  typedef int16_t Signed __attribute__((vector_size(2 * BUDGETKV_LANES)));
  const Short high = __builtin_convertvector(bytes, Short) << 8;
  const Short half = bitcast<Short>(bitcast<Signed>(high) >> 1) & 0xbfff;
  const Short is_nan = bitcast<Short>((half & 0x7fff) == 0x3f80);
  return widen(Fp16{}, static_cast<Short>(half | (is_nan & 0x7c00))) * 0x1p8f;
}
#else
BUDGETKV_INLINE Vec widen(Fp8, Byte bytes) {
  const Uint bits = __builtin_convertvector(bytes, Uint);
  const Uint magnitude = bits & 0x7f;
  const Vec normal = bitcast<Vec>((magnitude << 20) + (120u << 23));  // the bias, from 7 to 127
  const Vec subnormal = __builtin_convertvector(bitcast<Int>(magnitude), Vec) * 0x1p-9f;
  Vec result = select(magnitude < 8, subnormal, normal);
  result = select(magnitude == 0x7f, bitcast<Vec>(Uint{} + 0x7fc00000), result);
  return bitcast<Vec>(bitcast<Uint>(result) | (bits & 0x80) << 24);
}
#endif

// To nearest, ties to even; what is beyond the largest becomes that.
BUDGETKV_INLINE Byte narrow(Fp8, Vec x) {
  const Uint bits = bitcast<Uint>(x);
  const Uint magnitude = bits & 0x7fffffff;
  const Uint normal = (magnitude - (120u << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  // Adding 2^14 rounds a subnormal number, a multiple of 2^-9, into the low bits of the sum.
  const Uint subnormal = bitcast<Uint>(bitcast<Vec>(magnitude) + 0x1p14f) - 0x46800000;
  const Uint largest = Uint{} + 0x7e, nan = Uint{} + 0x7f;
  Vec result = select(magnitude < 0x3c800000, bitcast<Vec>(subnormal), bitcast<Vec>(normal));
  result = select(magnitude > 0x43e00000, bitcast<Vec>(largest), result);
  result = select(magnitude > 0x7f800000, bitcast<Vec>(nan), result);
  return __builtin_convertvector(bitcast<Uint>(result) | (bits >> 24 & 0x80), Byte);
}

// ---- memory --------------------------------------------------------------------------------

BUDGETKV_INLINE Vec load(const float* from) {
  Vec vec;
  __builtin_memcpy(&vec, from, sizeof(vec));
  return vec;
}
BUDGETKV_INLINE void store(float* to, Vec vec) { __builtin_memcpy(to, &vec, sizeof(vec)); }

template <class T>
BUDGETKV_INLINE Vec load(const T* from) {
  typename T::Bits bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return widen(T{}, bits);
}
template <class T>
BUDGETKV_INLINE void store(T* to, Vec vec) {
  const typename T::Bits bits = narrow(T{}, vec);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// Head sizes are multiples of 8, so only 16 lanes ever need a half vector: 8 values, then zeros.
constexpr int kTail = 8;
template <class T>
BUDGETKV_INLINE Vec load_tail(const T* from) {
  T padded[kLanes < kTail ? kTail : kLanes] = {};
  __builtin_memcpy(padded, from, kTail * sizeof(T));
  return load(padded);
}
template <class T>
BUDGETKV_INLINE void store_tail(T* to, Vec vec) {
  T padded[kLanes < kTail ? kTail : kLanes];
  store(padded, vec);
  __builtin_memcpy(to, padded, kTail * sizeof(T));
}

// Calls `body(offset, is_tail)` for each vector of a row of `size` values, a multiple of 8.
template <class Body>
BUDGETKV_INLINE void for_each_vector(int size, Body body) {
  int offset = 0;
  for (; offset + kLanes <= size; offset += kLanes) body(offset, false);
  if (offset < size) body(offset, true);
}

template <class T>
BUDGETKV_INLINE Vec load(const T* from, bool is_tail) {
  return is_tail ? load_tail(from) : load(from);
}
template <class T>
BUDGETKV_INLINE void store(T* to, Vec vec, bool is_tail) {
  is_tail ? store_tail(to, vec) : store(to, vec);
}

// The same at an index of an array whose type is known at run time only.
template <class T>
BUDGETKV_INLINE Vec load_at(const void* from, int64_t index, bool is_tail) {
  return load(static_cast<const T*>(from) + index, is_tail);
}
template <class T>
BUDGETKV_INLINE void store_at(void* to, int64_t index, Vec vec, bool is_tail) {
  store(static_cast<T*>(to) + index, vec, is_tail);
}
BUDGETKV_INLINE Vec load_as(FloatType type, const void* from, int64_t index, bool is_tail) {
  BUDGETKV_FOR_FLOAT_TYPE(type, load_at, from, index, is_tail);
}
BUDGETKV_INLINE void store_as(FloatType type, void* to, int64_t index, Vec vec, bool is_tail) {
  BUDGETKV_FOR_FLOAT_TYPE(type, store_at, to, index, vec, is_tail);
}

// ---- arithmetic ----------------------------------------------------------------------------

// Folds a vector in halves: log2(kLanes) steps instead of one for each lane.
template <int kWidth, class V, class Combine>
BUDGETKV_INLINE float fold_halves(V vec, Combine combine) {
  if constexpr (kWidth == 1) {
    return vec[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * kWidth)));
    Half low, high;
    __builtin_memcpy(&low, &vec, sizeof(Half));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&vec) + sizeof(Half), sizeof(Half));
    return fold_halves<kWidth / 2>(combine(low, high), combine);
  }
}
BUDGETKV_INLINE float reduce_add(Vec vec) {
  return fold_halves<kLanes>(vec, [](auto a, auto b) { return a + b; });
}
BUDGETKV_INLINE float reduce_max(Vec vec) {
  return fold_halves<kLanes>(vec, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x to 1 ulp: 0 below 2^-125 (so 0 for -inf), NaN for NaN; x must be below 127.
// Minimax polynomial of degree 6 on [-0.5, 0.5], relative error 1.9e-9.
BUDGETKV_INLINE Vec exp2(Vec x) {
  const Int vanishes = x < -125.0f;
  x = select(vanishes, splat(-125.0f), x);
  const Vec shifted = x + 0x1.8p23f;  // the integer part of x is now in the low mantissa bits
  const Vec f = x - (shifted - 0x1.8p23f);
  Vec p = splat(0x1.41d300p-13f);
  p = p * f + 0x1.5f456cp-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  const Vec scaled = bitcast<Vec>(bitcast<Int>(p) + (bitcast<Int>(shifted) << 23));
  return select(vanishes, Vec{}, scaled);
}

BUDGETKV_INLINE Vec exp(Vec x) { return exp2(x * 1.44269504f); }

// To 3 ulp: an odd polynomial near 0, where 1 - e^-2x would cancel. NaN for NaN.
BUDGETKV_INLINE Vec tanh(Vec x) {
  const Int is_negative = x < 0.0f;
  const Vec size = select(is_negative, -x, x);
  const Vec decay = exp(size * -2.0f);
  const Vec far = (1.0f - decay) / (1.0f + decay);
  const Vec square = x * x;
  Vec p = splat(-1382.0f / 155925.0f);
  p = p * square + 62.0f / 2835.0f;
  p = p * square - 17.0f / 315.0f;
  p = p * square + 2.0f / 15.0f;
  p = p * square - 1.0f / 3.0f;
  const Vec near = size + size * square * p;
  const Vec result = select(size < 0.3f, near, far);
  return select(is_negative, -result, result);
}

// Lane `o` of the lower (or upper) operand of step `step` of reduce_each; >= kLanes: of b.
constexpr int fold_source(int step, bool upper, int o) {
  const int quad = o / 4 * 4, r = o % 4, blocks = kLanes / 4, block = o / 4, lane = o % 4;
  const int half = blocks < 2 ? 1 : blocks / 2;
  switch (step) {
    case 0: return (r % 2 ? kLanes : 0) + quad + r / 2 + 2 * upper;
    case 1: return (r < 2 ? 0 : kLanes) + quad + r % 2 + 2 * upper;
    case 2: return (block < half ? 0 : kLanes) + (block % half + half * upper) * 4 + lane;
    default: return (block < half ? 0 : kLanes) + (block % half * 2 + upper) * 4 + lane;
  }
}
template <int kStep, int... kO>
BUDGETKV_INLINE Vec fold(Vec a, Vec b, std::integer_sequence<int, kO...>) {
  return __builtin_shufflevector(a, b, fold_source(kStep, false, kO)...) +
         __builtin_shufflevector(a, b, fold_source(kStep, true, kO)...);
}

// Sums each of kLanes vectors: lane i of the result is the sum of rows[i]. Destroys rows.
template <int kStep = 0>
BUDGETKV_INLINE Vec reduce_each(Vec* rows) {
  constexpr int kCount = kLanes >> kStep;
  if constexpr (kCount == 1) {
    return rows[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      rows[i] =
          fold<kStep>(rows[2 * i], rows[2 * i + 1], std::make_integer_sequence<int, kLanes>{});
    }
    return reduce_each<kStep + 1>(rows);
  }
}
