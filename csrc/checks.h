// What the ops check about their tensors, and their small views of them. Shapes and dtypes have
// been checked in Python; here are the things that would let a kernel write to wild memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <new>

#include "float_type.h"

namespace budgetkv {

inline void check_last_stride(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.stride(-1) == 1 || tensor.size(-1) == 1, name, " has stride ",
                    tensor.stride(-1), " in its last dimension; it must be 1");
}

// `field` is [P, N, D] or [P, N]: pages lie anywhere, the inside of a page is contiguous.
inline void check_pool_field(const char* name, const at::Tensor& field) {
  TORCH_CHECK_VALUE(field.select(0, 0).is_contiguous(), name,
                    " of a page are not contiguous; pass a field of a PagePool");
}

inline FloatType float_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return FloatType::kFloat32;
    case at::kBFloat16: return FloatType::kBfloat16;
    case at::kHalf: return FloatType::kFloat16;
    case at::kFloat8_e4m3fn: return FloatType::kFloat8;
    default:
      TORCH_CHECK_VALUE(false, type,
                        " is not a cache dtype; use float32, bfloat16, float16 or float8_e4m3fn");
  }
}

// Uninitialised floats on an aligned address, for one call of an op.
class AlignedFloats {
 public:
  AlignedFloats(int64_t count, int64_t alignment) {
    const int64_t bytes = (count * 4 + alignment - 1) / alignment * alignment;
    data_ = static_cast<float*>(std::aligned_alloc(alignment, bytes > 0 ? bytes : alignment));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  ~AlignedFloats() { std::free(data_); }
  float* data() const { return data_; }

 private:
  float* data_;
};

// The rows of a batch: slots [R] and query_start [R + 1], both int32, checked as they are read.
class BatchRows {
 public:
  BatchRows(const char* op, const at::Tensor& slots, const at::Tensor& query_start,
            int64_t num_slots, int64_t num_tokens)
      : op_(op),
        slots_(slots.accessor<int32_t, 1>()),
        starts_(query_start.accessor<int32_t, 1>()),
        num_slots_(num_slots) {
    TORCH_CHECK_VALUE(starts_.size(0) == size() + 1, op, ": query_start has ", starts_.size(0),
                      " entries for ", size(), " rows; it needs one more than there are rows");
    for (int64_t row = 0; row < size(); ++row) {
      TORCH_CHECK_INDEX(starts_[row] >= 0 && starts_[row] <= starts_[row + 1], op,
                        ": query_start falls at row ", row, ": ", starts_[row], " to ",
                        starts_[row + 1]);
    }
    TORCH_CHECK_INDEX(starts_[size()] <= num_tokens, op, ": query_start ends at ", starts_[size()],
                      ", but there are ", num_tokens, " tokens");
  }

  int64_t size() const { return slots_.size(0); }
  int64_t first_token(int64_t row) const { return starts_[row]; }
  int num_tokens(int64_t row) const { return starts_[row + 1] - starts_[row]; }
  int slot(int64_t row) const {
    TORCH_CHECK_INDEX(slots_[row] >= 0 && slots_[row] < num_slots_, op_, ": row ", row,
                      " is in slot ", slots_[row], ", but there are ", num_slots_, " slots");
    return slots_[row];
  }

 private:
  const char* op_;
  at::TensorAccessor<int32_t, 1> slots_;
  at::TensorAccessor<int32_t, 1> starts_;
  int64_t num_slots_;
};

}  // namespace budgetkv
