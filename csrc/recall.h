// What the index of one head says of its tokens, and how it is made. A page of an index has entries
// for some tokens each: codes of 4 bits for some channels, 8 to a word, and behind them a mark for
// each token; and it has the mean of each channel, and the steps and numbers of those with codes.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace budgetkv {

constexpr int64_t kCodesPerWord = 8;
constexpr int kCodeBits = 4;
constexpr float kMaxCode = 15.0f;

// The step of the best uniform quantiser of 16 levels for a Gaussian, in deviations (Max, 1960).
constexpr float kCodeStep = 0.3352f;

// The query heads of one KV head, against pages of its index.
struct IndexQuery {
  const float* queries;  // [num_queries, head_size]
  int64_t num_queries, head_size;
  float scale;        // of the logits
  FloatType type;     // of the digests
  int64_t num_words;  // of an entry's codes
};

// Floats of scratch that `index_logits` needs.
inline int64_t index_scratch_floats(int64_t num_queries, int64_t num_words) {
  return num_queries * ((num_words + 1) / 2 * 2 * kCodesPerWord + 1);
}

BUDGETKV_DECLARE(void index_logits(const IndexQuery& query,
                                   const int32_t* codes,  // [num_entries, num_words]
                                   const void* digest,    // mean [D], step [R], channel [R]
                                   int64_t num_entries, float* scratch,
                                   float* logits,  // [num_queries, stride], mutated
                                   int64_t stride))
// The sum over the queries of the softmax of their logits over all tokens.
BUDGETKV_DECLARE(void index_mass(float* logits,  // [num_queries, stride], destroyed
                                 int64_t num_queries, int64_t num_tokens, int64_t stride,
                                 float* mass))  // [num_tokens], mutated
// Means of `entry_tokens` neighbours each, of the keys at `keys`, in the type of digests.
BUDGETKV_DECLARE(void average_keys(FloatType key_type, const void* const* keys, int64_t num_tokens,
                                   int64_t entry_tokens, int64_t head_size, FloatType mean_type,
                                   void* means))  // [ceil(num_tokens / entry_tokens), D], mutated
// Mean and variance of each channel of the keys at `keys`, one pointer a token.
BUDGETKV_DECLARE(void measure_keys(FloatType type, const void* const* keys, int64_t num_tokens,
                                   int64_t head_size,
                                   float* mean,       // [D], mutated
                                   float* variance))  // [D], mutated
// Writes codes and digest of these keys by the R = 8 num_words channels `channels`, ascending.
BUDGETKV_DECLARE(void encode_page(FloatType type, const void* const* keys, int64_t num_tokens,
                                  int64_t head_size, int64_t num_words, const float* mean,
                                  const float* variance, const int32_t* channels, int32_t* codes,
                                  void* digest))

}  // namespace budgetkv
