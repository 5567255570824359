// recall: what a decode step's queries look for, from host memory into the first pages of a head.
// encode: the index that tells where it is. mark: which tokens need no bringing back.
//
// R rows, S slots, H heads, G query heads per KV head, W table width, P pages, N tokens of a page,
// D head size, I index pages, E entries of one, g tokens of an entry, B host blocks, M blocks of a
// slot.
// Spec: vllm_budgetkv/ops/reference/{recall,encode,mark}.py.
#include "recall.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "rank.h"
#include "tables.h"
#include "tier.h"

namespace budgetkv {
namespace {

constexpr int kWordBits = 32;

void check_index(const int32_t* pages, int64_t width, int64_t num_tokens, int64_t index_tokens,
                 int64_t pool_pages) {
  TORCH_CHECK_VALUE(num_tokens == 0 || index_tokens > 0, "an entry of an index has no tokens");
  if (num_tokens == 0) return;
  const int64_t num_pages = ceil_div(num_tokens, index_tokens);
  TORCH_CHECK_VALUE(num_tokens >= 0 && num_pages <= width, "an index of ", num_tokens,
                    " tokens needs ", num_pages, " pages, but there is room for ", width);
  for (int64_t j = 0; j < num_pages; ++j) {
    TORCH_CHECK_INDEX(pages[j] >= 0 && pages[j] < pool_pages, "entry ", j, " of an index is page ",
                      pages[j], ", but the pool has ", pool_pages);
  }
}

// A field of the pool, [P, ...].
template <class T>
struct PageField {
  explicit PageField(const at::Tensor& field)
      : data(static_cast<char*>(field.data_ptr())), bytes(field.stride(0) * field.element_size()) {}
  T* at(int64_t page) const { return reinterpret_cast<T*>(data + page * bytes); }
  char* data;
  int64_t bytes;
};

struct PoolFields {
  PageField<char> keys, values;
  PageField<int32_t> positions, index;
  PageField<char> digests;
  int64_t page_tokens, row_bytes;
};

// Where codes and marks are in the words of an index page (arithmetic/index_page.py).
struct IndexPage {
  IndexPage(int64_t page_words, int64_t code_words, int64_t entry_tokens)
      : entry_tokens(entry_tokens),
        entries(entry_tokens < 1
                    ? 0
                    : kWordBits * page_words / (kWordBits * code_words + entry_tokens) / 8 * 8),
        tokens(entries * entry_tokens),
        first_mark(entries * code_words) {}
  bool marks(const int32_t* words, int64_t token) const {
    return words[first_mark + token / kWordBits] >> (token % kWordBits) & 1;
  }
  int64_t entry_tokens, entries, tokens, first_mark;
};

// One head of one row that recalls.
struct Task {
  int64_t slot, head, num_tokens, count;
  const float* queries;
  const int32_t* pages;  // of its table
  const int32_t* index;
  IndexPage index_page;
  int64_t first_logit;  // of the scratch that all tasks share
};

bool holds(const Task& task, const PoolFields& pool, int64_t token) {
  const int32_t* words = pool.index.at(task.index[token / task.index_page.tokens]);
  return task.index_page.marks(words, token % task.index_page.tokens);
}

// From a number for each entry to one for each of the tokens, in place.
void spread(float* numbers, int64_t num_tokens, int64_t entry_tokens) {
  if (entry_tokens == 1) return;
  for (int64_t t = num_tokens - 1; t >= 0; --t) numbers[t] = numbers[t / entry_tokens];
}

// Marks the `count` tokens with the largest mass that the head does not hold.
std::vector<char> choose_tokens(const Task& task, const PoolFields& pool, const float* mass) {
  std::vector<uint64_t> keys;
  keys.reserve(task.num_tokens);
  for (int64_t j = 0; j < task.num_tokens; ++j) {
    if (!holds(task, pool, j)) keys.push_back(rank_key(0, mass[j], j));
  }
  const int64_t found = keys.size();
  TORCH_CHECK_VALUE(found >= task.count, "slot ", task.slot, " head ", task.head, " recalls ",
                    task.count, " tokens, but lacks ", found);
  rank_best(keys.data(), found, task.count);
  std::vector<char> wanted(task.num_tokens, false);
  for (int64_t j = 0; j < task.count; ++j) wanted[rank_index(keys[j])] = true;
  return wanted;
}

// Puts what is missing over what is no longer wanted; returns how many moved.
int32_t swap_tokens(const Task& task, const PoolFields& pool, std::vector<char> wanted,
                    const TierTokens& tier) {
  std::vector<int64_t> places;
  for (int64_t i = 0; i < task.count; ++i) {
    const int32_t at = pool.positions.at(task.pages[i / pool.page_tokens])[i % pool.page_tokens];
    const bool is_hit = at >= 0 && at < task.num_tokens && wanted[at];
    if (is_hit) {
      wanted[at] = false;
    } else {
      places.push_back(i);
    }
  }
  auto place = places.begin();
  for (int64_t token = 0; token < task.num_tokens; ++token) {
    if (!wanted[token]) continue;
    const int64_t page = task.pages[*place / pool.page_tokens], row = *place % pool.page_tokens;
    const int64_t offset = row * pool.row_bytes;
    std::memcpy(pool.keys.at(page) + offset, tier.at(task.head, 0, token), pool.row_bytes);
    std::memcpy(pool.values.at(page) + offset, tier.at(task.head, 1, token), pool.row_bytes);
    pool.positions.at(page)[row] = static_cast<int32_t>(token);
    ++place;
  }
  return static_cast<int32_t>(place - places.begin());
}

// The channels with the largest energy times variance, ascending; of equals the lower ones.
std::vector<int32_t> choose_channels(const float* energy, const std::vector<float>& variance,
                                     int64_t count) {
  std::vector<int32_t> order(variance.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return energy[a] * variance[a] > energy[b] * variance[b];
  });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace

void recall(const at::Tensor& query,            // [R, H * G, D]
            const at::Tensor& keys,             // [P, N, D], mutated
            const at::Tensor& values,           // as keys
            const at::Tensor& positions,        // int32 [P, N], mutated
            const at::Tensor& words,            // int32 [P, words]
            const at::Tensor& digests,          // [P, 2, D]
            int64_t code_words,                 // of an entry
            const at::Tensor& slots,            // int32 [R]
            const at::Tensor& query_start,      // int32 [R + 1]
            const at::Tensor& table_in,         // int32 [S, H, W]
            const at::Tensor& index_in,         // int32 [S, H, I]
            const at::Tensor& num_tokens_in,    // int32 [S, H]
            const at::Tensor& num_recalled_in,  // int32 [S, H]
            const at::Tensor& entry_tokens_in,  // int32 [S, H]
            const at::Tensor& tokens,           // [B, H, 2, N, D]
            const at::Tensor& blocks_in,        // int32 [S, M]
            double scale,
            const at::Tensor& moved_in  // int32 [S, H], mutated
) {
  check_last_stride("table", table_in);
  check_last_stride("index", index_in);
  check_last_stride("tier.tokens", tokens);
  const at::Tensor queries = query.to(at::kFloat).contiguous();
  const auto table = table_in.accessor<int32_t, 3>(), index = index_in.accessor<int32_t, 3>();
  const auto num_tokens = num_tokens_in.accessor<int32_t, 2>();
  const auto num_recalled = num_recalled_in.accessor<int32_t, 2>();
  const auto entry_tokens = entry_tokens_in.accessor<int32_t, 2>();
  const auto blocks = blocks_in.accessor<int32_t, 2>();
  auto moved = moved_in.accessor<int32_t, 2>();
  const PoolFields pool{PageField<char>(keys),
                        PageField<char>(values),
                        PageField<int32_t>(positions),
                        PageField<int32_t>(words),
                        PageField<char>(digests),
                        keys.size(1),
                        keys.size(2) * keys.element_size()};
  const int64_t num_heads = table.size(1), head_size = query.size(2);
  const int64_t group = query.size(1) / num_heads, num_pages = keys.size(0);
  const BatchRows rows("recall", slots, query_start, table.size(0), query.size(0));

  std::vector<Task> tasks;
  // a page of a task each, so that few heads of a long prompt keep all threads busy
  std::vector<std::pair<int64_t, int64_t>> pages;
  int64_t num_logits = 0;
  for (int64_t r = 0; r < rows.size(); ++r) {
    if (rows.num_tokens(r) == 0) continue;
    const int slot = rows.slot(r);
    for (int64_t h = 0; h < num_heads; ++h) {
      const Task task{slot,
                      h,
                      num_tokens[slot][h],
                      num_recalled[slot][h],
                      queries.const_data_ptr<float>() + (r * num_heads + h) * group * head_size,
                      table[slot][h].data(),
                      index[slot][h].data(),
                      IndexPage(words.size(1), code_words, entry_tokens[slot][h]),
                      num_logits};
      if (task.count == 0) continue;
      check_head(table[slot][h], task.count, pool.page_tokens, num_pages);
      check_index(task.index, index.size(2), task.num_tokens, task.index_page.tokens, num_pages);
      TierTokens(tokens, blocks[slot].data(), blocks.size(1)).check(task.num_tokens);
      for (int64_t j = 0; j * task.index_page.tokens < task.num_tokens; ++j) {
        pages.emplace_back(tasks.size(), j);
      }
      num_logits += (group + 1) * task.num_tokens;
      tasks.push_back(task);
    }
  }

  std::vector<float> logits(num_logits);
  at::parallel_for(0, pages.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(index_scratch_floats(group, code_words));
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[pages[i].first];
      const IndexPage& index_page = task.index_page;
      const int64_t first = pages[i].second * index_page.tokens;
      const int64_t count = std::min(index_page.tokens, task.num_tokens - first);
      const int32_t page = task.index[pages[i].second];
      const IndexQuery index_query{task.queries,
                                   group,
                                   head_size,
                                   static_cast<float>(scale),
                                   float_type(digests.scalar_type()),
                                   code_words};
      float* found = logits.data() + task.first_logit + first;
      BUDGETKV_PICK(index_logits)
      (index_query, pool.index.at(page), pool.digests.at(page),
       ceil_div(count, index_page.entry_tokens), scratch.data(), found, task.num_tokens);
      for (int64_t g = 0; g < group; ++g) {
        spread(found + g * task.num_tokens, count, index_page.entry_tokens);
      }
    }
  });
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[i];
      float* row = logits.data() + task.first_logit;
      float* mass = row + group * task.num_tokens;
      BUDGETKV_PICK(index_mass)(row, group, task.num_tokens, task.num_tokens, mass);
      const TierTokens tier(tokens, blocks[task.slot].data(), blocks.size(1));
      moved[task.slot][task.head] += swap_tokens(task, pool, choose_tokens(task, pool, mass), tier);
    }
  });
}

void encode(const at::Tensor& tokens,           // [B, H, 2, N, D]
            const at::Tensor& blocks,           // int32 [M]
            const at::Tensor& index_in,         // int32 [H, I]
            const at::Tensor& num_tokens_in,    // int32 [H]
            const at::Tensor& entry_tokens_in,  // int32 [H]
            const at::Tensor& words,            // int32 [P, words], mutated
            int64_t code_words,                 // of an entry
            const at::Tensor& digests,          // [P, 2, D], mutated
            const at::Tensor& energy_in         // float32 [H, D]
) {
  check_last_stride("index", index_in);
  check_last_stride("tier.tokens", tokens);
  check_last_stride("blocks", blocks);
  const auto index = index_in.accessor<int32_t, 2>();
  const auto num_tokens = num_tokens_in.accessor<int32_t, 1>();
  const auto entry_tokens = entry_tokens_in.accessor<int32_t, 1>();
  const TierTokens tier(tokens, blocks.const_data_ptr<int32_t>(), blocks.size(0));
  const at::Tensor energy = energy_in.contiguous();
  const int64_t head_size = tokens.size(4), mean_bytes = head_size * digests.element_size();
  struct Page {
    int64_t head, first;
    IndexPage index_page;
  };
  std::vector<Page> pages;
  for (int64_t h = 0; h < num_tokens.size(0); ++h) {
    const IndexPage index_page(words.size(1), code_words, entry_tokens[h]);
    check_index(index[h].data(), index.size(1), num_tokens[h], index_page.tokens, words.size(0));
    tier.check(num_tokens[h]);
    for (int64_t first = 0; first < num_tokens[h]; first += index_page.tokens) {
      pages.push_back({h, first, index_page});
    }
  }
  const PageField<int32_t> word_field(words);
  const PageField<char> digest_field(digests);
  const FloatType type = float_type(digests.scalar_type());
  const FloatType key_type = float_type(tokens.scalar_type());
  at::parallel_for(0, pages.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [h, first, index_page] = pages[i];
      const int64_t page = index[h][first / index_page.tokens];
      std::vector<const void*> keys(std::min<int64_t>(index_page.tokens, num_tokens[h] - first));
      for (size_t t = 0; t < keys.size(); ++t) keys[t] = tier.at(h, 0, first + t);
      std::vector<char> means;
      if (index_page.entry_tokens > 1 || key_type != type) {
        const int64_t count = keys.size(), num_entries = ceil_div(count, index_page.entry_tokens);
        means.resize(num_entries * mean_bytes);
        BUDGETKV_PICK(average_keys)
        (key_type, keys.data(), count, index_page.entry_tokens, head_size, type, means.data());
        keys.resize(num_entries);
        for (int64_t e = 0; e < num_entries; ++e) keys[e] = means.data() + e * mean_bytes;
      }
      std::vector<float> mean(head_size), variance(head_size);
      const int64_t count = keys.size();
      BUDGETKV_PICK(measure_keys)
      (type, keys.data(), count, head_size, mean.data(), variance.data());
      const std::vector<int32_t> channels = choose_channels(
          energy.const_data_ptr<float>() + h * head_size, variance, kCodesPerWord * code_words);
      BUDGETKV_PICK(encode_page)
      (type, keys.data(), count, head_size, code_words, mean.data(), variance.data(),
       channels.data(), word_field.at(page), digest_field.at(page));
    }
  });
}

void mark(const at::Tensor& positions,        // int32 [P, N]
          const at::Tensor& words,            // int32 [P, words], mutated
          const at::Tensor& table_in,         // int32 [H, W]
          const at::Tensor& lens_in,          // int32 [H]
          const at::Tensor& index_in,         // int32 [H, I]
          const at::Tensor& num_tokens_in,    // int32 [H]
          const at::Tensor& num_recalled_in,  // int32 [H]
          const at::Tensor& entry_tokens_in,  // int32 [H]
          int64_t code_words) {
  check_last_stride("index", index_in);
  const auto table = table_in.accessor<int32_t, 2>(), index = index_in.accessor<int32_t, 2>();
  const auto lens = lens_in.accessor<int32_t, 1>();
  const auto num_tokens = num_tokens_in.accessor<int32_t, 1>();
  const auto num_recalled = num_recalled_in.accessor<int32_t, 1>();
  const auto entry_tokens = entry_tokens_in.accessor<int32_t, 1>();
  const int64_t page_tokens = positions.size(1);
  const PageField<int32_t> position_field(positions), word_field(words);
  for (int64_t h = 0; h < lens.size(0); ++h) {
    const IndexPage index_page(words.size(1), code_words, entry_tokens[h]);
    check_head(table[h], lens[h], page_tokens, positions.size(0));
    check_index(index[h].data(), index.size(1), num_tokens[h], index_page.tokens,
                positions.size(0));
    if (num_tokens[h] == 0) continue;
    for (int64_t first = 0; first < num_tokens[h]; first += index_page.tokens) {
      std::fill_n(word_field.at(index[h][first / index_page.tokens]) + index_page.first_mark,
                  ceil_div(index_page.tokens, kWordBits), 0);
    }
    for (int64_t i = num_recalled[h]; i < lens[h]; ++i) {
      const int32_t token = position_field.at(table[h][i / page_tokens])[i % page_tokens];
      if (token < 0 || token >= num_tokens[h]) continue;
      const int64_t bit = token % index_page.tokens;
      int32_t& word = word_field.at(
          index[h][token / index_page.tokens])[index_page.first_mark + bit / kWordBits];
      word = static_cast<int32_t>(static_cast<uint32_t>(word) | 1u << (bit % kWordBits));
    }
  }
}

TORCH_LIBRARY_FRAGMENT(budgetkv, m) {
  m.def(
      "recall(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
      "Tensor words, Tensor digests, int code_words, Tensor slots, Tensor query_start, "
      "Tensor table, Tensor index, Tensor num_tokens, Tensor num_recalled, Tensor entry_tokens, "
      "Tensor tokens, Tensor blocks, float scale, Tensor(d!) moved) -> ()");
  m.def(
      "encode(Tensor tokens, Tensor blocks, Tensor index, Tensor num_tokens, Tensor entry_tokens, "
      "Tensor(a!) words, int code_words, Tensor(b!) digests, Tensor energy) -> ()");
  m.def(
      "mark(Tensor positions, Tensor(a!) words, Tensor table, Tensor lens, Tensor index, "
      "Tensor num_tokens, Tensor num_recalled, Tensor entry_tokens, int code_words) -> ()");
}

TORCH_LIBRARY_IMPL(budgetkv, CPU, m) {
  m.impl("recall", &recall);
  m.impl("encode", &encode);
  m.impl("mark", &mark);
}

}  // namespace budgetkv
