// The boxes of one call: which tokens each one reads, and its RoI-Align map. Checked once, on the host.
// Suffixes: T tokens, D width, B boxes, R query rows, S packed keys, P cells per side, K taps per axis.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu_kernels.h"

namespace vreflection {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One box. Its keys are the tokens that can have a weight: all of the rectangle, or, with an RoI-Align map, the rows
// and columns that some tap reads. `keys` of them start at `begin` in the axis of all such keys.
struct Region {
  int64_t first, stride, height, width, packed_begin;
  int64_t begin, keys;
  int64_t used_rows, used_columns;
};

struct Tap {
  int64_t index;  // among the used rows or columns of the region
  double weight;
};

struct Regions {
  std::vector<Region> boxes;
  std::vector<int64_t> token;   // of each key
  std::vector<int64_t> packed;  // place of each key on the axis S
  int64_t num_packed = 0;
  bool has_cells = false;
  int64_t side = 0;                // P
  std::vector<int64_t> tap_begin;  // (B, 2, P) + 1: where the taps of a cell row or column start
  std::vector<Tap> taps;

  int64_t num_boxes() const { return int64_t(boxes.size()); }
  int64_t num_keys() const { return int64_t(token.size()); }
  const Tap* taps_from(int64_t box, int axis, int64_t cell) const {
    return taps.data() + tap_begin[slot(box, axis, cell)];
  }
  const Tap* taps_to(int64_t box, int axis, int64_t cell) const {
    return taps.data() + tap_begin[slot(box, axis, cell) + 1];
  }
  // Elements before each key's token.
  std::vector<int64_t> offsets(int64_t stride) const;

 private:
  int64_t slot(int64_t box, int axis, int64_t cell) const { return (box * 2 + axis) * side + cell; }
};

Regions plan_regions(const Tensor& spans, const std::optional<Tensor>& tap_index,
                     const std::optional<Tensor>& tap_weight, int64_t num_tokens);

// Packed keys must be S in number.
void check_packed(const Regions& regions, int64_t num_packed, const char* what);

// Work of one thread at a time: tasks are drawn from a shared counter, so that unequal boxes fill all threads. What a
// task computes does not depend on who computes it. `run(worker, task)`; `worker` names a thread's scratch memory.
template <class F>
void run_tasks(int64_t num_tasks, int64_t num_workers, const F& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < num_tasks; task = next++) run(worker, task);
  });
}
inline int64_t worker_count(int64_t num_tasks) {
  const int64_t threads = torch::stable::get_num_threads();
  return num_tasks < 1 ? 1 : num_tasks < threads ? num_tasks : threads;
}

// Uninitialised memory of `count` values for the length of a call, from torch's allocator.
template <class W>
class Workspace {
 public:
  explicit Workspace(int64_t count)
      : memory_(torch::stable::empty({count * int64_t(sizeof(W)) + 64}, ScalarType::Byte)),
        data_(reinterpret_cast<W*>((reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr()) + 63) / 64 * 64)) {}
  W* data() const { return data_; }

 private:
  Tensor memory_;
  W* data_;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Calls `run` with a null pointer of the storage type. The kernels are looked up here first: an unknown instruction set
// must be refused outside of parallel work, where an exception keeps its message.
template <class F>
auto with_storage(const Tensor& tensor, const char* name, const F& run) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16, name,
                  ": expected float32, float64 or bfloat16 on the CPU, got ", torch::headeronly::toString(type),
                  "; convert it, or use the plain torch implementation");
  kernels<float>();
  if (type == ScalarType::Double) return run(static_cast<double*>(nullptr));
  if (type == ScalarType::BFloat16) return run(static_cast<bf16*>(nullptr));
  return run(static_cast<float*>(nullptr));
}
inline ScalarType wide_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class X>
const X* data_of(const Tensor& tensor) {
  return static_cast<const X*>(tensor.const_data_ptr());
}
template <class X>
X* mutable_data_of(const Tensor& tensor) {
  return static_cast<X*>(tensor.mutable_data_ptr());
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
}
inline void check_size(const Tensor& tensor, int64_t axis, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.size(axis) == size, name, ": expected size ", size, " on axis ", axis, ", got ",
                  tensor.size(axis));
}
inline void check_type(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}
// Tokens may be a strided view, as long as channels lie beside each other.
inline void check_tokens(const Tensor& tokens) {
  check_dim(tokens, 2, "tokens");
  STD_TORCH_CHECK(tokens.size(1) <= 1 || tokens.stride(1) == 1, "tokens: expected stride 1 along channels, got ",
                  tokens.stride(1));
}

}  // namespace vreflection
