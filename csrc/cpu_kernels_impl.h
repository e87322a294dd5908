// Body of the vector kernels. Each cpu_kernels_<isa>.cpp includes it once, after it has chosen the instruction set and
// defined VREFLECTION_ISA (a namespace), VREFLECTION_VECTOR_BYTES and VREFLECTION_TILE_ROWS. It uses no function of the
// standard library: such a function would be compiled for this instruction set and might serve the whole program.
#include "cpu_kernels.h"

#include "cpu_vectors.h"

#include "cpu_products.h"

namespace vreflection::VREFLECTION_ISA {
namespace {

template <class W>
VR_INLINE Vec<W> load_columns(const W* from, int64_t count) {
  return count >= kLanes<W> ? load(from) : load_part(from, count);
}
template <class W>
VR_INLINE void store_columns(W* to, Vec<W> value, int64_t count) {
  if (count >= kLanes<W>) {
    store<W>(to, value);
  } else {
    store_part<W>(to, value, count);
  }
}

template <class W>
void softmax_columns(W* scores, int64_t ld, int64_t count, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes<W>) {
    const int64_t part = columns - c;
    Vec<W> top = load_columns<W>(scores + c, part), total = {};
    for (int64_t n = 1; n < count; ++n) {
      const Vec<W> score = load_columns<W>(scores + n * ld + c, part);
      top = score > top ? score : top;
    }
    for (int64_t n = 0; n < count; ++n) {
      const Vec<W> power = exp_negative(load_columns<W>(scores + n * ld + c, part) - top);
      total += power;
      store_columns<W>(scores + n * ld + c, power, part);
    }
    const Vec<W> scale = W(1) / total;
    for (int64_t n = 0; n < count; ++n)
      store_columns<W>(scores + n * ld + c, load_columns<W>(scores + n * ld + c, part) * scale, part);
  }
}

template <class W>
void softmax_backward_columns(W* grad, int64_t ld_grad, const W* probability, int64_t ld, int64_t count,
                              int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes<W>) {
    const int64_t part = columns - c;
    Vec<W> total = {};
    for (int64_t n = 0; n < count; ++n)
      total += load_columns<W>(grad + n * ld_grad + c, part) * load_columns<W>(probability + n * ld + c, part);
    for (int64_t n = 0; n < count; ++n) {
      const Vec<W> centred = load_columns<W>(grad + n * ld_grad + c, part) - total;
      store_columns<W>(grad + n * ld_grad + c, centred * load_columns<W>(probability + n * ld + c, part), part);
    }
  }
}

template <class X>
void add_scaled(Wide<X>* out, const X* in, Wide<X> scale, int64_t count) {
  using W = Wide<X>;
  constexpr int L = kLanes<W>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<W>(out + i, load(out + i) + load(in + i) * scale);
  if (i < count) {
    const int64_t left = count - i;
    store_part<W>(out + i, load_part(out + i, left) + load_part(in + i, left) * scale, left);
  }
}

}  // namespace
}  // namespace vreflection::VREFLECTION_ISA

#include "cpu_decode.h"

namespace vreflection::VREFLECTION_ISA {

#if defined(VREFLECTION_BF16_PAIRS)
const Kernels<bf16>& pair_table() {
  static const Kernels<bf16> kTable = {dot_rows<Pairs>,
                                       mix_rows_in_pairs,
                                       outer_rows<bf16>,
                                       softmax_columns<float>,
                                       softmax_backward_columns<float>,
                                       add_scaled<float>,
                                       add_scaled<bf16>,
                                       widen<bf16>,
                                       narrow<bf16>,
                                       linear_rows<Pairs>,
                                       softmax_rows<float>,
                                       mix_values<bf16>,
                                       norm_row<bf16>,
                                       gate_row<bf16>,
                                       add_row<bf16>};
  return kTable;
}
#else
template <class X>
const Kernels<X>& table() {
  using W = Wide<X>;
  static const Kernels<X> kTable = {
      dot_rows<Plain<X> >,    mix_rows<X>,     outer_rows<X>, softmax_columns<W>, softmax_backward_columns<W>,
      add_scaled<W>,          add_scaled<X>,   widen<X>,      narrow<X>,
      linear_rows<Plain<X> >, softmax_rows<W>, mix_values<X>, norm_row<X>,        gate_row<X>,
      add_row<X>};
  return kTable;
}
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();
template const Kernels<bf16>& table<bf16>();
#endif

}  // namespace vreflection::VREFLECTION_ISA
