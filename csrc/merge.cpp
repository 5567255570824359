// merge: dropped tokens of every head go into the kept ones that are most like them.
//
// H heads, n tokens, W table width, P pages, N tokens of a page, D head size.
// Spec: vllm_budgetkv/ops/reference/merge.py.
#include "merge.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "tables.h"

namespace budgetkv {
namespace {

enum class Mode { kAverage, kPivot, kWeighted, kValue };

Mode parse_mode(std::string_view name) {
  if (name == "average") return Mode::kAverage;
  if (name == "pivot") return Mode::kPivot;
  if (name == "weighted") return Mode::kWeighted;
  TORCH_CHECK_VALUE(name == "value", name, " is not a way to merge");
  return Mode::kValue;
}

// One dropped token on its way into a kept one, both as indices of the head's tokens.
struct Move {
  int64_t source, pivot;
  float similarity;
};
using Moves = std::vector<Move>;

struct Head {
  int64_t offset(int64_t token) const {
    return table[token / page_tokens] * page_bytes + token % page_tokens * token_bytes;
  }
  const bool *keep, *is_vision;  // [num_tokens]
  const int32_t* table;
  int64_t num_tokens, page_tokens, page_bytes, token_bytes, head_size;
  FloatType type;
  char *keys, *values;  // of the pool's first page
};

// Tokens of one modality, or all tokens without one, as indices and as offsets.
struct TokenList {
  void add(const Head& head, int64_t token) {
    tokens.push_back(token);
    offsets.push_back(head.offset(token));
  }
  int64_t size() const { return tokens.size(); }
  std::vector<int64_t> tokens, offsets;
};

// Adds a move for every dropped token; none if nothing is kept that it could go to.
void add_moves(const Head& head, const TokenList& kept, const TokenList& dropped, Moves& moves) {
  if (kept.size() == 0 || dropped.size() == 0) return;
  std::vector<float> packed(Segment{kept.size()}.padded() * head.head_size);
  std::vector<float> rows(kRowTile * head.head_size), cosines(kRowTile * kBlockTokens);
  std::vector<int64_t> pivots(dropped.size());
  std::vector<float> similarities(dropped.size());
  BUDGETKV_PICK(find_pivots)
  ({head.type, head.keys, head.head_size, kept.offsets.data(), dropped.offsets.data(), kept.size(),
    dropped.size(), packed.data(), rows.data(), cosines.data(), pivots.data(),
    similarities.data()});
  for (int64_t i = 0; i < dropped.size(); ++i) {
    moves.push_back({dropped.tokens[i], kept.tokens[pivots[i]], similarities[i]});
  }
}

Moves find_moves(const Head& head, bool split_modalities) {
  TokenList kept[2], dropped[2];
  for (int64_t i = 0; i < head.num_tokens; ++i) {
    const int modality = split_modalities && head.is_vision[i];
    (head.keep[i] ? kept : dropped)[modality].add(head, i);
  }
  Moves moves;
  for (const int modality : {0, 1}) add_moves(head, kept[modality], dropped[modality], moves);
  return moves;
}

// Leaves the moves of positions whose similarity, as a mean over the heads that drop them, is at
// least that of all moves. float64 sums of float32 numbers: no order of the heads changes them.
void drop_unlike(const std::vector<Head>& heads, const at::Tensor& positions, int64_t seen_tokens,
                 std::vector<Moves>& moves) {
  const int32_t* data = positions.const_data_ptr<int32_t>();
  std::vector<double> sums(seen_tokens);
  std::vector<int64_t> counts(seen_tokens);
  const auto position = [&](const Head& head, const Move& move) -> int64_t {
    const int64_t page = head.table[move.source / head.page_tokens];
    return data[page * positions.stride(0) + move.source % head.page_tokens];
  };
  double sum = 0.0;
  int64_t count = 0;
  for (size_t h = 0; h < heads.size(); ++h) {
    for (const Move& move : moves[h]) {
      const int64_t at = position(heads[h], move);
      TORCH_CHECK_INDEX(at >= 0 && at < seen_tokens, "head ", h, " holds a token of position ", at,
                        ", but seen_tokens is ", seen_tokens);
      sums[at] += move.similarity;
      sum += move.similarity;
      counts[at] += 1;
      count += 1;
    }
  }
  for (size_t h = 0; h < heads.size(); ++h) {
    std::erase_if(moves[h], [&](const Move& move) {
      const int64_t at = position(heads[h], move);
      return sums[at] / counts[at] < sum / count;
    });
  }
}

float weigh_move(const Head& head, const Move& move, Mode mode) {
  if (mode == Mode::kAverage) return 1.0f;
  if (mode == Mode::kPivot) return 0.5f;
  if (mode == Mode::kWeighted) return move.similarity;
  const auto norm = BUDGETKV_PICK(token_norm);
  const float source = norm(head.type, head.values + head.offset(move.source), head.head_size);
  const float pivot = norm(head.type, head.values + head.offset(move.pivot), head.head_size);
  const float both = source + pivot;
  return both > 0.0f ? std::max(0.0f, move.similarity) * source / both : 0.0f;
}

// Changes the pivots of one head. Sources are dropped tokens, so the order of pivots is free.
void mix_head(const Head& head, Moves& moves, Mode mode) {
  const auto mix = BUDGETKV_PICK(mix);
  std::stable_sort(moves.begin(), moves.end(),
                   [](const Move& a, const Move& b) { return a.pivot < b.pivot; });
  std::vector<int64_t> sources;
  std::vector<float> weights;
  for (size_t first = 0; first < moves.size(); first += sources.size()) {
    const int64_t pivot = moves[first].pivot;
    sources.clear();
    weights.clear();
    float weight_sum = 0.0f;
    for (size_t i = first; i < moves.size() && moves[i].pivot == pivot; ++i) {
      sources.push_back(head.offset(moves[i].source));
      weights.push_back(weigh_move(head, moves[i], mode));
      weight_sum += weights.back();
    }
    const int64_t count = sources.size();
    // with "pivot" a source is first averaged with its pivot, which so gets the other half
    const float own = mode == Mode::kPivot ? 1.0f + weight_sum : 1.0f;
    const float total = 1.0f + (mode == Mode::kValue ? weight_sum : static_cast<float>(count));
    for (char* field : {head.keys, head.values}) {
      if (mode == Mode::kValue && field == head.keys) continue;
      mix({head.type, field, head.head_size, head.offset(pivot), sources.data(), weights.data(),
           count, own, total});
    }
  }
}

}  // namespace

void merge(const at::Tensor& keep_in,  // bool [H, n]
           const at::Tensor& keys,     // [P, N, D], as values
           const at::Tensor& values,
           const at::Tensor& positions,     // int32 [P, N]
           const at::Tensor& table_in,      // int32 [H, W]
           const at::Tensor& lens_in,       // int32 [H]
           const at::Tensor& is_vision_in,  // bool [H, n]
           std::string_view mode_name, double threshold, int64_t seen_tokens) {
  const at::Tensor keep = keep_in.contiguous(), is_vision = is_vision_in.contiguous();
  const at::Tensor table = table_in.contiguous();
  const auto pages = table.accessor<int32_t, 2>();
  const auto lens = lens_in.accessor<int32_t, 1>();
  const int64_t num_heads = lens.size(0), num_tokens = keep.size(1), item_bytes = keys.itemsize();
  const Mode mode = parse_mode(mode_name);

  std::vector<Head> heads(num_heads);
  for (int64_t h = 0; h < num_heads; ++h) {
    TORCH_CHECK_VALUE(lens[h] <= num_tokens, "head ", h, " holds ", lens[h],
                      " tokens but keep covers ", num_tokens);
    check_head(pages[h], lens[h], keys.size(1), keys.size(0));
    heads[h] = {keep.const_data_ptr<bool>() + h * num_tokens,
                is_vision.const_data_ptr<bool>() + h * num_tokens,
                pages[h].data(),
                lens[h],
                keys.size(1),
                keys.stride(0) * item_bytes,
                keys.stride(1) * item_bytes,
                keys.size(2),
                float_type(keys.scalar_type()),
                static_cast<char*>(keys.mutable_data_ptr()),
                static_cast<char*>(values.mutable_data_ptr())};
  }
  std::vector<Moves> moves(num_heads);
  at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) moves[h] = find_moves(heads[h], mode == Mode::kValue);
  });
  if (mode == Mode::kWeighted) drop_unlike(heads, positions, seen_tokens, moves);
  at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      if (mode == Mode::kValue) {
        std::erase_if(moves[h], [&](const Move& move) {
          return !(move.similarity >= static_cast<float>(threshold));
        });
      }
      mix_head(heads[h], moves[h], mode);
    }
  });
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "merge(Tensor keep, Tensor(a!) keys, Tensor(b!) values, Tensor positions, Tensor table, "
      "Tensor lens, Tensor is_vision, str mode, float threshold, int seen_tokens) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) { m.impl("merge", &merge); }

}  // namespace budgetkv
