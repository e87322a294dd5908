// Vector kernels of the CPU operators: one table of functions per storage type, compiled once per instruction set and
// chosen at run time. Names: T tokens, R query rows, D width, L vector lanes.
#pragma once

#include <cstdint>

// Tables above the baseline: GCC 11 knows all that they use. Other compilers get the baseline's table.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 11
#define VREFLECTION_X86_TABLES 1
#endif
#endif

namespace vreflection {

struct bf16 {
  uint16_t bits;
};

template <class X>
struct wide_of {
  using type = float;
};
template <>
struct wide_of<double> {
  using type = double;
};
// What sums are kept in: float, or double for double.
template <class X>
using Wide = typename wide_of<X>::type;

// Columns of one register tile are a multiple of this for every instruction set and type (3 vectors of at most 16).
constexpr int64_t kTileColumns = 48;
// Reduction depth of one pass of `dot_rows`: 8 rows x 1024 floats fill a first-level cache of 32 KiB. 512 measured
// about the same; without blocking, rows would come from the second-level cache for every three tokens.
constexpr int64_t kDotBlock = 1024;
// Output of `dot_rows` is padded to this many rows per token.
constexpr int64_t kRowPad = 8;

template <class X>
struct Kernels {
  using W = Wide<X>;

  // out[t * ld_out + r] = sum_k tokens[offset[t] + k] * rows[r * ld_rows + k]. `ld_out` is a multiple of kRowPad;
  // `scratch` holds num_rows * kDotBlock wide values.
  void (*dot_rows)(const X* tokens, const int64_t* offset, int64_t count, const X* rows, int64_t ld_rows,
                   int64_t num_rows, int64_t width, W* out, int64_t ld_out, W* scratch);

  // out[out_row[r] + c] = sum_n weights[n * ld_weights + r] * tokens[offset[n] + c] for c < columns, added to what is
  // there with `add` (without it, `count` is at least 1). Output rows hold a multiple of kTileColumns; what lies past
  // `columns` is written, too.
  void (*mix_rows)(const W* weights, int64_t ld_weights, int64_t num_rows, const X* tokens, const int64_t* offset,
                   int64_t count, int64_t columns, bool add, W* out, const int64_t* out_row);

  // out[r * ld_out + c] = sum_m left[m * ld_left + r] * right[m * ld_right + c], overwritten, for r < num_rows and
  // c < columns. Rows of `right` must be readable up to a multiple of kTileColumns.
  void (*outer_rows)(const W* left, int64_t ld_left, int64_t num_rows, const W* right, int64_t ld_right, int64_t depth,
                     int64_t columns, X* out, int64_t ld_out);

  // Softmax over `count` rows, for each of `columns` columns; in place.
  void (*softmax_columns)(W* scores, int64_t ld, int64_t count, int64_t columns);
  // grad := probability * (grad - sum over rows of probability * grad), per column.
  void (*softmax_backward_columns)(W* grad, int64_t ld_grad, const W* probability, int64_t ld, int64_t count,
                                   int64_t columns);

  // out += scale * in
  void (*add_scaled)(W* out, const W* in, W scale, int64_t count);
  void (*add_scaled_tokens)(W* out, const X* in, W scale, int64_t count);
  void (*widen)(const X* in, W* out, int64_t count);
  void (*narrow)(const W* in, X* out, int64_t count);

  // out[r * ld_out + n] = sum_k w[n * width + k] * x[r * ld_x + k] for n < count; made for few rows of x. An output
  // does not depend on `count` or `num_rows`.
  void (*linear_rows)(const X* w, int64_t count, int64_t width, const X* x, int64_t ld_x, int64_t num_rows, W* out,
                      int64_t ld_out);
  // Softmax of scale * scores along each row, scale > 0; rows hold a multiple of 16 values, what follows `count` is
  // written, too.
  void (*softmax_rows)(W* scores, int64_t ld, int64_t num_rows, int64_t count, W scale);
  // out[r * width + c] = sum_t weights[r * ld + t] * values[t * width + c]
  void (*mix_values)(const W* weights, int64_t ld, int64_t num_rows, const X* values, int64_t count, int64_t width,
                     W* out);
  // out := weight * x / sqrt(mean(x^2) + eps)
  void (*norm_row)(const X* x, const X* weight, double eps, int64_t width, X* out);
  // out := silu(gate) * up, rounded twice
  void (*gate_row)(const X* gate, const X* up, X* out, int64_t count);
  // x += y
  void (*add_row)(X* x, const X* y, int64_t count);
};

namespace avx512bf16 {
const Kernels<bf16>& pair_table();
}
namespace avx512 {
template <class X>
const Kernels<X>& table();
}
namespace avx2 {
template <class X>
const Kernels<X>& table();
}
namespace generic {
template <class X>
const Kernels<X>& table();
}

// The table for this machine, or for what VREFLECTION_CPU_ISA (generic, avx2, avx512, avx512bf16) asks for.
template <class X>
const Kernels<X>& kernels();

}  // namespace vreflection
