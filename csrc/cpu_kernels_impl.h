// Body of the vector kernels. Each cpu_kernels_<isa>.cpp includes it once, after it has chosen the instruction set and
// defined VREFLECTION_ISA (a namespace), VREFLECTION_VECTOR_BYTES and VREFLECTION_TILE_ROWS. It uses no function of the
// standard library: such a function would be compiled for this instruction set and might serve the whole program.
#include "cpu_kernels.h"

namespace vreflection::VREFLECTION_ISA {
namespace {

#define VR_INLINE inline __attribute__((always_inline))

constexpr int kBytes = VREFLECTION_VECTOR_BYTES;
constexpr int kTileRows = VREFLECTION_TILE_ROWS;  // tile of accumulators: kTileRows x 3 vectors
constexpr int64_t kMixBlock = 128;                // 128 x 48 floats of packed tokens are 24 KiB, three quarters of L1

template <class W>
struct Vector;
template <>
struct Vector<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  typedef uint32_t U __attribute__((vector_size(kBytes)));
  typedef uint16_t H __attribute__((vector_size(kBytes / 2)));
};
template <>
struct Vector<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t I __attribute__((vector_size(kBytes)));
};
template <class W>
using Vec = typename Vector<W>::V;
template <class W>
constexpr int kLanes = kBytes / int(sizeof(W));

VR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class W>
VR_INLINE Vec<W> load(const W* from) {
  Vec<W> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
VR_INLINE Vec<float> load(const bf16* from) {
  Vector<float>::H half;
  __builtin_memcpy(&half, from, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, Vector<float>::U) << 16);
}
template <class W>
VR_INLINE void store(W* to, Vec<W> value) {
  __builtin_memcpy(to, &value, sizeof value);
}
// Round to nearest even; a NaN stays a NaN.
VR_INLINE void store(bf16* to, Vec<float> value) {
  typedef Vector<float>::U U;
  const U bits = (U)value;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U kept = (U)(value == value) & rounded;
  const U nan = ~(U)(value == value) & 0x7fc0u;
  const Vector<float>::H half = __builtin_convertvector(kept | nan, Vector<float>::H);
  __builtin_memcpy(to, &half, sizeof half);
}

// Keeps a value in a register: GCC would load it again for each of its uses, and a load costs as much as a product.
template <class V>
VR_INLINE V in_register(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

// Tails touch no memory past `count`: what lies there may be another tensor, or nothing.
template <class X>
VR_INLINE Vec<Wide<X>> load_part(const X* from, int64_t count) {
  X buffer[kLanes<Wide<X>>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}
template <class X>
VR_INLINE void store_part(X* to, Vec<Wide<X>> value, int64_t count) {
  X buffer[kLanes<Wide<X>>];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

template <class W>
VR_INLINE Vec<W> lane_shuffle(Vec<W> a, Vec<W> b, int segment, int odd) {
  typename Vector<W>::I index;
  for (int i = 0; i < kLanes<W>; ++i) index[i] = (2 * (i / segment) + odd) * segment + i % segment;
#if defined(__clang__)
  W both[2 * kLanes<W>];
  store<W>(both, a);
  store<W>(both + kLanes<W>, b);
  Vec<W> out;
  for (int i = 0; i < kLanes<W>; ++i) out[i] = both[index[i]];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Sums the lanes of `kCount` vectors; sum r comes to lane r % L of vector r / L. Every step adds the odd segments of
// two vectors to their even ones, so a step halves both the segments and the number of vectors.
template <class W, int kCount, int kSegment>
VR_INLINE void sum_lanes(Vec<W>* sums) {
  if constexpr (kSegment > 0) {
    constexpr int kLeft = kCount > 1 ? kCount / 2 : 1;
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) {
      const Vec<W> a = sums[kCount > 1 ? 2 * i : 0], b = sums[kCount > 1 ? 2 * i + 1 : 0];
      sums[i] = lane_shuffle<W>(a, b, kSegment, 0) + lane_shuffle<W>(a, b, kSegment, 1);
    }
    sum_lanes<W, kLeft, kSegment / 2>(sums);
  }
}

// kRows query rows against three tokens, over `depth` channels; adds to out[t * ld_out + r].
template <class X, int kRows>
void dot_tile(const X* const (&tokens)[3], int num_tokens, const Wide<X>* rows, int64_t ld, int64_t depth, Wide<X>* out,
              int64_t ld_out) {
  using W = Wide<X>;
  constexpr int L = kLanes<W>;
  Vec<W> sums[3][kRows] = {};
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    const Vec<W> a = load(tokens[0] + k), b = load(tokens[1] + k), c = load(tokens[2] + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<W> row = in_register(load(rows + r * ld + k));
      sums[0][r] += a * row;
      sums[1][r] += b * row;
      sums[2][r] += c * row;
    }
  }
  if (k < depth) {
    for (int r = 0; r < kRows; ++r) {
      const Vec<W> row = load_part(rows + r * ld + k, depth - k);
      for (int t = 0; t < 3; ++t) sums[t][r] += load_part(tokens[t] + k, depth - k) * row;
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < 3; ++t) {
    if (t >= num_tokens) break;
    sum_lanes<W, kRows, L / 2>(sums[t]);
    W total[kRows > L ? kRows : L];
#pragma GCC unroll 8
    for (int v = 0; v * L < kRows; ++v) store<W>(total + v * L, sums[t][v]);
    for (int r = 0; r < kRows; ++r) out[t * ld_out + r] += total[r];
  }
}

template <class X>
void dot_group(const X* const (&tokens)[3], int num_tokens, const Wide<X>* rows, int64_t ld, int64_t num_rows,
               int64_t depth, Wide<X>* out, int64_t ld_out) {
  int64_t r = 0;
  for (; r + kTileRows <= num_rows; r += kTileRows)
    dot_tile<X, kTileRows>(tokens, num_tokens, rows + r * ld, ld, depth, out + r, ld_out);
  if (kTileRows > 4 && num_rows - r >= 4) {
    dot_tile<X, 4>(tokens, num_tokens, rows + r * ld, ld, depth, out + r, ld_out);
    r += 4;
  }
  if (num_rows - r >= 2) {
    dot_tile<X, 2>(tokens, num_tokens, rows + r * ld, ld, depth, out + r, ld_out);
    r += 2;
  }
  if (num_rows - r >= 1) dot_tile<X, 1>(tokens, num_tokens, rows + r * ld, ld, depth, out + r, ld_out);
}

template <class X>
void widen(const X* in, Wide<X>* out, int64_t count) {
  constexpr int L = kLanes<Wide<X>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<Wide<X>>(out + i, load(in + i));
  if (i < count) store_part<Wide<X>>(out + i, load_part(in + i, count - i), count - i);
}

template <class X>
void narrow(const Wide<X>* in, X* out, int64_t count) {
  constexpr int L = kLanes<Wide<X>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(out + i, load(in + i));
  if (i < count) store_part(out + i, load_part(in + i, count - i), count - i);
}

template <class X>
void dot_rows(const X* tokens, const int64_t* offset, int64_t count, const X* rows, int64_t ld_rows, int64_t num_rows,
              int64_t width, Wide<X>* out, int64_t ld_out, Wide<X>* scratch) {
  using W = Wide<X>;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < num_rows; ++r) out[t * ld_out + r] = 0;
  for (int64_t k = 0; k < width; k += kDotBlock) {
    const int64_t depth = smaller(kDotBlock, width - k);
    const W* wide_rows;
    int64_t ld = ld_rows;
    if constexpr (sizeof(X) == sizeof(W)) {
      wide_rows = rows + k;
    } else {
      for (int64_t r = 0; r < num_rows; ++r) widen(rows + r * ld_rows + k, scratch + r * kDotBlock, depth);
      wide_rows = scratch;
      ld = kDotBlock;
    }
    for (int64_t group = 0; group < num_rows; group += kTileRows) {
      const int64_t group_rows = smaller(kTileRows, num_rows - group);
      for (int64_t t = 0; t < count; t += 3) {
        const int64_t last = count - 1;
        const X* const tile[3] = {tokens + offset[t] + k, tokens + offset[smaller(t + 1, last)] + k,
                                  tokens + offset[smaller(t + 2, last)] + k};
        dot_group(tile, int(smaller(3, count - t)), wide_rows + group * ld, ld, group_rows, depth,
                  out + t * ld_out + group, ld_out);
      }
    }
  }
}

// Where a tile of `mix_rows` finds its tokens: packed beside each other, or in place.
template <class W>
struct Packed {
  const W* tile;
  VR_INLINE const W* row(int64_t n) const { return tile + n * 3 * kLanes<W>; }
};
template <class X>
struct InPlace {
  const X* tokens;
  const int64_t* offset;
  VR_INLINE const X* row(int64_t n) const { return tokens + offset[n]; }
};

template <class W, int kRows, class Source>
void mix_tile(const W* weights, int64_t ld, Source source, int64_t count, W* out, const int64_t* out_row) {
  constexpr int L = kLanes<W>;
  Vec<W> sums[kRows][3] = {};
  for (int64_t n = 0; n < count; ++n) {
    const auto* token = source.row(n);
    const Vec<W> a = load(token), b = load(token + L), c = load(token + 2 * L);
    const W* weight = weights + n * ld;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] += a * weight[r];
      sums[r][1] += b * weight[r];
      sums[r][2] += c * weight[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    W* to = out + out_row[r];
    store<W>(to, load(to) + sums[r][0]);
    store<W>(to + L, load(to + L) + sums[r][1]);
    store<W>(to + 2 * L, load(to + 2 * L) + sums[r][2]);
  }
}

template <class W, class Source>
void mix_group(const W* weights, int64_t ld, int64_t num_rows, Source source, int64_t count, W* out,
               const int64_t* out_row) {
  int64_t r = 0;
  for (; r + kTileRows <= num_rows; r += kTileRows)
    mix_tile<W, kTileRows>(weights + r, ld, source, count, out, out_row + r);
  if (kTileRows > 4 && num_rows - r >= 4) {
    mix_tile<W, 4>(weights + r, ld, source, count, out, out_row + r);
    r += 4;
  }
  if (num_rows - r >= 2) {
    mix_tile<W, 2>(weights + r, ld, source, count, out, out_row + r);
    r += 2;
  }
  if (num_rows - r >= 1) mix_tile<W, 1>(weights + r, ld, source, count, out, out_row + r);
}

// Copies the next columns of a block of tokens beside each other, widened, and asks for the columns after them. Packing
// matters: rows of 14 KiB would all fall into the same few sets of the first-level cache.
template <class X>
void pack_tile(const X* tokens, const int64_t* offset, int64_t count, int64_t columns, int64_t ahead, Wide<X>* packed) {
  using W = Wide<X>;
  constexpr int L = kLanes<W>;
  for (int64_t n = 0; n < count; ++n, packed += 3 * L) {
    const X* token = tokens + offset[n];
    for (int64_t line = 0; line < ahead; line += 64 / int64_t(sizeof(X))) __builtin_prefetch(token + columns + line);
    if (columns == 3 * L) {
      for (int v = 0; v < 3; ++v) store<W>(packed + v * L, load(token + v * L));
    } else {
      for (int v = 0; v < 3; ++v) {
        const int64_t left = columns - v * L;
        store<W>(packed + v * L, left > 0 ? load_part(token + v * L, smaller(left, L)) : Vec<W>{});
      }
    }
  }
}

template <class X>
void mix_rows(const Wide<X>* weights, int64_t ld_weights, int64_t num_rows, const X* tokens, const int64_t* offset,
              int64_t count, int64_t columns, Wide<X>* out, const int64_t* out_row) {
  using W = Wide<X>;
  constexpr int64_t kColumns = 3 * kLanes<W>;
  // Few rows use a token once or twice only: a copy would not pay. Short blocks then, to walk along the rows.
  const bool in_place = num_rows <= 2 * kTileRows;
  const int64_t block = in_place ? 16 : kMixBlock;
  alignas(64) W packed[kMixBlock * kColumns];
  for (int64_t n = 0; n < count; n += block) {
    const int64_t depth = smaller(block, count - n);
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t part = smaller(kColumns, columns - c);
      const W* block_weights = weights + n * ld_weights;
      if (in_place && part == kColumns) {
        mix_group(block_weights, ld_weights, num_rows, InPlace<X>{tokens + c, offset + n}, depth, out + c, out_row);
      } else {
        const int64_t ahead = in_place ? 0 : smaller(kColumns, columns - c - part);
        pack_tile(tokens + c, offset + n, depth, part, ahead, packed);
        mix_group(block_weights, ld_weights, num_rows, Packed<W>{packed}, depth, out + c, out_row);
      }
    }
  }
}

#if defined(__AVX512F__)
VR_INLINE void stream(float* to, Vec<float> value) { _mm512_stream_ps(to, (__m512)value); }
#elif defined(__AVX2__)
VR_INLINE void stream(float* to, Vec<float> value) { _mm256_stream_ps(to, (__m256)value); }
#else
VR_INLINE void stream(float* to, Vec<float> value) { store<float>(to, value); }
#endif
VR_INLINE void stream(double* to, Vec<double> value) { store<double>(to, value); }
VR_INLINE void stream(bf16* to, Vec<float> value) { store(to, value); }

template <class X, int kRows>
void outer_tile(const Wide<X>* left, int64_t ld_left, const Wide<X>* right, int64_t ld_right, int64_t depth,
                int64_t columns, bool aligned, X* out, int64_t ld_out) {
  using W = Wide<X>;
  constexpr int L = kLanes<W>;
  Vec<W> sums[kRows][3] = {};
  for (int64_t m = 0; m < depth; ++m) {
    const W* row = right + m * ld_right;
    const Vec<W> a = load(row), b = load(row + L), c = load(row + 2 * L);
    const W* scale = left + m * ld_left;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] += a * scale[r];
      sums[r][1] += b * scale[r];
      sums[r][2] += c * scale[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    X* to = out + r * ld_out;
    if (aligned && columns == 3 * L) {
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) stream(to + v * L, sums[r][v]);
    } else {
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v)
        if (columns > v * L) store_part(to + v * L, sums[r][v], smaller(L, columns - v * L));
    }
  }
}

template <class X>
void outer_rows(const Wide<X>* left, int64_t ld_left, int64_t num_rows, const Wide<X>* right, int64_t ld_right,
                int64_t depth, int64_t columns, X* out, int64_t ld_out) {
  constexpr int64_t kColumns = 3 * kLanes<Wide<X>>;
  // The output is written once and is larger than the caches: whole vectors bypass them where the address allows it.
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kBytes == 0 && (ld_out * sizeof(X)) % kBytes == 0;
  for (int64_t r = 0; r < num_rows; r += kTileRows) {
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t part = smaller(kColumns, columns - c);
      X* to = out + r * ld_out + c;
      if (num_rows - r >= kTileRows) {
        outer_tile<X, kTileRows>(left + r, ld_left, right + c, ld_right, depth, part, aligned, to, ld_out);
      } else {
        for (int64_t i = 0; i < num_rows - r; ++i)
          outer_tile<X, 1>(left + r + i, ld_left, right + c, ld_right, depth, part, aligned, to + i * ld_out, ld_out);
      }
    }
  }
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// e^x for x <= 0 (or NaN): x = n ln 2 + r, polynomial in r (Cephes), n added to the exponent.
VR_INLINE Vec<float> exp_negative(Vec<float> x) {
  typedef Vector<float>::I I;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  const I below = x < -87.0f;
  const Vec<float> bounded = below ? Vec<float>{} - 87.0f : x;
  const Vec<float> shifted = bounded * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec<float> y = p * (r * r) + r + 1.0f;
  const I exponent = ((I)shifted - 0x4b400000 + 127) << 23;
  return below ? Vec<float>{} : y * (Vec<float>)exponent;
}
VR_INLINE Vec<double> exp_negative(Vec<double> x) {
  typedef Vector<double>::I I;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const I below = x < -708.0;
  const Vec<double> bounded = below ? Vec<double>{} - 708.0 : x;
  const Vec<double> shifted = bounded * 1.4426950408889634074 + magic;
  const Vec<double> n = shifted - magic;
  const Vec<double> r = bounded - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
  // Taylor to degree 13: the rest is below 1e-17 for |r| <= ln 2 / 2.
  Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  const Vec<double> y = p * (r * r) + r + 1.0;
  const I exponent = ((I)shifted - 0x4338000000000000 + 1023) << 52;
  return below ? Vec<double>{} : y * (Vec<double>)exponent;
}

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

template <class X>
const Kernels<X>& table() {
  using W = Wide<X>;
  static const Kernels<X> kTable = {dot_rows<X>,  mix_rows<X>,   outer_rows<X>, softmax_columns<W>, softmax_backward_columns<W>,
                                    add_scaled<W>, add_scaled<X>, widen<X>,      narrow<X>};
  return kTable;
}
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();
template const Kernels<bf16>& table<bf16>();

}  // namespace vreflection::VREFLECTION_ISA
