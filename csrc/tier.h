// One layer of the tokens that host memory keeps, as one request sees it.
#pragma once

#include "checks.h"

namespace budgetkv {

class TierTokens {
 public:
  // `tokens` is [B, H, 2, N, D], `blocks` int32 [M], those of the request.
  TierTokens(const at::Tensor& tokens, const int32_t* blocks, int64_t num_blocks)
      : tokens_(tokens),
        data_(static_cast<const char*>(tokens.const_data_ptr())),
        item_(tokens.element_size()),
        page_tokens_(tokens.size(3)),
        blocks_(blocks),
        num_blocks_(num_blocks) {}

  // Part 0 of a token is its key, part 1 its value.
  const char* at(int64_t head, int64_t part, int64_t position) const {
    const int64_t place = block_of(position) * tokens_.stride(0) + head * tokens_.stride(1) +
                          part * tokens_.stride(2) + position % page_tokens_ * tokens_.stride(3);
    return data_ + place * item_;
  }

  // An error unless the first `num_tokens` tokens are there.
  void check(int64_t num_tokens) const {
    for (int64_t first = 0; first < num_tokens; first += page_tokens_) {
      TORCH_CHECK_INDEX(first / page_tokens_ < num_blocks_ && block_of(first) >= 0 &&
                            block_of(first) < tokens_.size(0),
                        "token ", first, " of ", num_tokens, " has no host block");
    }
  }

 private:
  int64_t block_of(int64_t position) const { return blocks_[position / page_tokens_]; }

  const at::Tensor& tokens_;
  const char* data_;
  int64_t item_, page_tokens_;
  const int32_t* blocks_;
  int64_t num_blocks_;
};

}  // namespace budgetkv
