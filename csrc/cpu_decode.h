// What a decode step is made of besides its products over boxes: a few rows against weights that are read once, and
// attention of one head group over its own keys. Included by cpu_kernels_impl.h only.
namespace vreflection::VREFLECTION_ISA {
namespace {

constexpr int64_t kLinearTile = 8;                  // weight rows per tile: their eight sums share the sums over lanes
constexpr bool kManyRegisters = kTileRows >= 8;     // 32 registers rather than 16
constexpr int kPairTile = kManyRegisters ? 8 : 4;   // weight rows against two rows of x
constexpr int kQuadTile = kManyRegisters ? 4 : 2;   // and against four
constexpr float kNothing = -__builtin_inff();

// The last channels, where they do not fill a vector; a function of its own, so that its calls cost the loop before it
// no registers.
template <class P>
__attribute__((noinline)) void linear_rest(const typename P::X* w, int64_t ld_w, const typename P::X* x, int64_t ld_x,
                                           int64_t depth, int kept, int num_rows, typename P::W* out, int64_t ld_out) {
  using W = typename P::W;
  for (int m = 0; m < num_rows; ++m) {
    const typename P::Value row = P::part_value(x + m * ld_x, depth);
    for (int n = 0; n < kept; ++n) {
      Vec<W> sum = P::multiply_add(Vec<W>{}, P::part_value(w + n * ld_w, depth), row);
      sum_lanes<W, 1, kLanes<W> / 2>(&sum);
      out[m * ld_out + n] += sum[0];
    }
  }
}

// kN weight rows against kM rows of x. With kAhead it asks for the weights that come next.
template <class P, int kN, int kM, bool kAhead>
void linear_tile(const typename P::X* w, int64_t width, const typename P::X* x, int64_t ld_x, typename P::W* out,
                 int64_t ld_out) {
  using W = typename P::W;
  using Value = typename P::Value;
  constexpr int L = kLanes<W>;
  const int64_t ahead = kLinearTile * width;
  Vec<W> sums[kM][kN];
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) sums[m][n] = Vec<W>{};
  int64_t k = 0;
  for (; k + P::kStep <= width; k += P::kStep) {
    Value rows[kM];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) rows[m] = in_register(P::load_value(x + m * ld_x + k));
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      const Value weight = P::load_value(w + n * width + k);
      if constexpr (kAhead) __builtin_prefetch(w + ahead + n * width + k, 0, 2);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) sums[m][n] = P::multiply_add(sums[m][n], weight, rows[m]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
    sum_lanes<W, kN, L / 2>(sums[m]);
    if constexpr (kN % L == 0) {
#pragma GCC unroll 8
      for (int v = 0; v * L < kN; ++v) store<W>(out + m * ld_out + v * L, sums[m][v]);
    } else {
      __builtin_memcpy(out + m * ld_out, &sums[m][0], kN * sizeof(W));
    }
  }
  if (k < width) linear_rest<P>(w + k, width, x + k, ld_x, width - k, kN, kM, out, ld_out);
}

// All weight rows of a tile against kM rows of x.
template <class P, int kN, int kM, bool kAhead>
VR_INLINE void linear_strip(const typename P::X* w, int64_t width, const typename P::X* x, int64_t ld_x,
                            typename P::W* out, int64_t ld_out) {
  for (int64_t n = 0; n < kLinearTile; n += kN)
    linear_tile<P, kN, kM, kAhead>(w + n * width, width, x, ld_x, out + n, ld_out);
}

template <class P, bool kAhead>
void linear_block(const typename P::X* w, int64_t width, const typename P::X* x, int64_t ld_x, int64_t num_rows,
                  typename P::W* out, int64_t ld_out) {
  // The first strip brings the weights in; only it looks ahead.
  if (num_rows == 1) return linear_strip<P, kLinearTile, 1, kAhead>(w, width, x, ld_x, out, ld_out);
  if (num_rows < 4) {
    linear_strip<P, kPairTile, 2, kAhead>(w, width, x, ld_x, out, ld_out);
  } else {
    linear_strip<P, kQuadTile, 4, kAhead>(w, width, x, ld_x, out, ld_out);
  }
  int64_t r = num_rows < 4 ? 2 : 4;
  for (; r + 4 <= num_rows; r += 4)
    linear_strip<P, kQuadTile, 4, false>(w, width, x + r * ld_x, ld_x, out + r * ld_out, ld_out);
  if (num_rows - r >= 2) {
    linear_strip<P, kPairTile, 2, false>(w, width, x + r * ld_x, ld_x, out + r * ld_out, ld_out);
    r += 2;
  }
  if (r < num_rows) linear_strip<P, kLinearTile, 1, false>(w, width, x + r * ld_x, ld_x, out + r * ld_out, ld_out);
}

// What an output is does not depend on the tile that computes it.
template <class P>
void linear_rows(const typename P::X* w, int64_t count, int64_t width, const typename P::X* x, int64_t ld_x,
                 int64_t num_rows, typename P::W* out, int64_t ld_out) {
  int64_t n = 0;
  for (; n + 2 * kLinearTile <= count; n += kLinearTile)
    linear_block<P, true>(w + n * width, width, x, ld_x, num_rows, out + n, ld_out);
  for (; n + kLinearTile <= count; n += kLinearTile)
    linear_block<P, false>(w + n * width, width, x, ld_x, num_rows, out + n, ld_out);
  for (; n < count; ++n)
    for (int64_t r = 0; r < num_rows; ++r)
      linear_tile<P, 1, 1, false>(w + n * width, width, x + r * ld_x, ld_x, out + r * ld_out + n, ld_out);
}

template <class W>
void softmax_rows(W* scores, int64_t ld, int64_t num_rows, int64_t count, W scale) {
  constexpr int L = kLanes<W>;
  for (int64_t r = 0; r < num_rows; ++r) {
    W* row = scores + r * ld;
    int64_t end = count;
    for (; end % L != 0; ++end) row[end] = W(kNothing);
    Vec<W> tops = load(row);
    for (int64_t n = L; n < end; n += L) {
      const Vec<W> score = load(row + n);
      tops = score > tops ? score : tops;
    }
    W top = tops[0];
    for (int i = 1; i < L; ++i) top = tops[i] > top ? tops[i] : top;
    Vec<W> totals = {};
    for (int64_t n = 0; n < end; n += L) {
      const Vec<W> power = exp_negative((load(row + n) - top) * scale);
      totals += power;
      store<W>(row + n, power);
    }
    W total = 0;
    for (int i = 0; i < L; ++i) total += totals[i];
    const W share = W(1) / total;
    for (int64_t n = 0; n < end; n += L) store<W>(row + n, load(row + n) * share);
  }
}

// kRows sums of weighted value vectors, kVectors vectors of columns.
template <class X, int kRows, int kVectors>
void mix_values_tile(const Wide<X>* weights, int64_t ld, const X* values, int64_t count, int64_t width,
                     int64_t columns, Wide<X>* out) {
  using W = Wide<X>;
  constexpr int L = kLanes<W>;
  Vec<W> sums[kRows][kVectors] = {};
  for (int64_t t = 0; t < count; ++t) {
    const X* value = values + t * width;
    Vec<W> parts[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      parts[v] = kVectors > 1 || columns >= L ? load(value + v * L) : load_part(value, columns);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const W weight = weights[r * ld + t];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += parts[v] * weight;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store_columns<W>(out + r * width + v * L, sums[r][v], columns - v * L);
}

template <class X, int kRows>
void mix_values_group(const Wide<X>* weights, int64_t ld, const X* values, int64_t count, int64_t width, Wide<X>* out) {
  constexpr int L = kLanes<Wide<X>>;
  int64_t c = 0;
  if constexpr (kRows < 4)
    for (; c + 4 * L <= width; c += 4 * L)
      mix_values_tile<X, kRows, 4>(weights, ld, values + c, count, width, 4 * L, out + c);
  for (; c + 2 * L <= width; c += 2 * L)
    mix_values_tile<X, kRows, 2>(weights, ld, values + c, count, width, 2 * L, out + c);
  for (; c < width; c += L)
    mix_values_tile<X, kRows, 1>(weights, ld, values + c, count, width, smaller(L, width - c), out + c);
}

template <class X>
void mix_values(const Wide<X>* weights, int64_t ld, int64_t num_rows, const X* values, int64_t count, int64_t width,
                Wide<X>* out) {
  int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4)
    mix_values_group<X, 4>(weights + r * ld, ld, values, count, width, out + r * width);
  if (num_rows - r >= 2) {
    mix_values_group<X, 2>(weights + r * ld, ld, values, count, width, out + r * width);
    r += 2;
  }
  if (r < num_rows) mix_values_group<X, 1>(weights + r * ld, ld, values, count, width, out + r * width);
}

template <class X>
VR_INLINE Vec<Wide<X>> load_some(const X* from, int64_t left) {
  return left >= kLanes<Wide<X>> ? load(from) : load_part(from, left);
}
template <class X>
VR_INLINE void store_some(X* to, Vec<Wide<X>> value, int64_t left) {
  if (left >= kLanes<Wide<X>>) {
    store(to, value);
  } else {
    store_part(to, value, left);
  }
}
// A value as it is after one store and one load: rounded to the storage type.
VR_INLINE Vec<float> rounded(const float*, Vec<float> value) { return value; }
VR_INLINE Vec<double> rounded(const double*, Vec<double> value) { return value; }
VR_INLINE Vec<float> rounded(const bf16*, Vec<float> value) { return (Vec<float>)(bf16_bits(value) << 16); }

template <class X>
void norm_row(const X* x, const X* weight, double eps, int64_t width, X* out) {
  using W = Wide<X>;
  constexpr int L = kLanes<W>;
  Vec<W> sums = {};
  for (int64_t i = 0; i < width; i += L) {
    const Vec<W> value = load_some(x + i, width - i);
    sums += value * value;
  }
  W total = 0;
  for (int i = 0; i < L; ++i) total += sums[i];
  const W scale = W(1) / W(__builtin_sqrt(total / W(width) + W(eps)));
  for (int64_t i = 0; i < width; i += L) {
    const int64_t left = width - i;
    store_some(out + i, load_some(x + i, left) * scale * load_some(weight + i, left), left);
  }
}

template <class X>
void gate_row(const X* gate, const X* up, X* out, int64_t count) {
  using W = Wide<X>;
  for (int64_t i = 0; i < count; i += kLanes<W>) {
    const int64_t left = count - i;
    const Vec<W> g = load_some(gate + i, left), power = exp_negative(g > 0 ? -g : g);
    const Vec<W> silu = (g > 0 ? g : g * power) / (1 + power);
    store_some(out + i, rounded(gate, silu) * load_some(up + i, left), left);
  }
}

template <class X>
void add_row(X* x, const X* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<Wide<X>>) {
    const int64_t left = count - i;
    store_some(x + i, load_some(x + i, left) + load_some(y + i, left), left);
  }
}

}  // namespace
}  // namespace vreflection::VREFLECTION_ISA
