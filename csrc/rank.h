// The total order of tokens (and pages): tier, then score, then recency.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

namespace budgetkv {

constexpr int kRankIndexBits = 24;
constexpr uint64_t kRankIndexMask = (uint64_t{1} << kRankIndexBits) - 1;

// Larger stays first: tier (8 bits) | score (32 bits) | index (24 bits). The index makes keys
// unique.
inline uint64_t rank_key(uint8_t tier, float score, int64_t index) {
  if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
  score += 0.0f;  // turns -0 into +0, which compare equal
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  // flips negative floats and lifts positive ones above them, so that bits order as floats do
  bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u;
  return uint64_t{tier} << 56 | uint64_t{bits} << kRankIndexBits | static_cast<uint64_t>(index);
}

// Moves the `count` largest of `num_keys` keys to the front, in no order. Linear time.
inline void rank_best(uint64_t* keys, int64_t num_keys, int64_t count) {
  if (count <= 0 || count >= num_keys) return;
  std::nth_element(keys, keys + count - 1, keys + num_keys, std::greater<>());
}

inline int64_t rank_index(uint64_t key) { return static_cast<int64_t>(key & kRankIndexMask); }

}  // namespace budgetkv
