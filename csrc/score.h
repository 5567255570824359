// Probe attention of one query head over the packed keys of its KV head.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace budgetkv {

constexpr int64_t kBlockTokens = 64;  // tokens of a packed block, a multiple of all vector sizes
constexpr int64_t kRowTile = 16;      // probe rows whose logits are held at a time

// One block of a head's tokens, to be transposed so that a vector holds one channel of kLanes keys.
struct PackTask {
  FloatType type;
  const char *keys, *values;  // of the pool's first page
  int64_t page_bytes, page_tokens, head_size;
  float value_unit;                 // what a stored value of 1 stands for
  const int32_t* table;             // pages of the head
  int64_t first_token, num_tokens;  // 1 to kBlockTokens tokens
  float* packed;                    // [head_size, kBlockTokens], mutated: 0 behind the last token
  float* norms;                     // [num_tokens], mutated: L2 norm of the values
};

// A head's tokens lie in two segments, sinks and the rest, each padded to whole blocks.
struct Segment {
  int64_t num_tokens;
  int64_t padded() const { return (num_tokens + kBlockTokens - 1) / kBlockTokens * kBlockTokens; }
};

struct ScoreTask {
  const float* packed;  // blocks of [head_size, kBlockTokens]: the sinks', then the rest's
  Segment sinks, rest;
  const float* queries;  // [num_rows, head_size]
  float scale;           // of the logits, times log2(e)
  float soft_cap;        // that bends them, times log2(e); 0 for none
  float sink;            // logit of a token without a key, times log2(e); -inf for none
  int64_t num_rows, head_size, top_k;
  bool takes_largest;  // of the probabilities over rows, not their sum
  float* logits;       // scratch [kRowTile, sinks.padded() + rest.padded()]
  // [sinks.padded() + rest.padded()], mutated: probabilities are added over rows, or raise it
  float* mass;
};

BUDGETKV_DECLARE(void pack_block(const PackTask& task);
                 // Returns the sum over the rows of the top-k mass; needs a non-empty rest for it.
                 float score_rows(const ScoreTask& task))

}  // namespace budgetkv
