// The products that everything is made of, as register tiles. Included by cpu_kernels_impl.h only.
namespace vreflection::VREFLECTION_ISA {
namespace {

constexpr int64_t kInPlaceRows = 4 * kTileRows, kInPlaceBlock = 16;
constexpr int64_t kMixBlock = 128;  // 128 x 48 floats of packed tokens are 24 KiB, three quarters of L1

// How a tile multiplies. `Plain`: values are widened when loaded, then multiplied and added.
template <class T>
struct Plain {
  using X = T;          // of tokens
  using Row = Wide<T>;  // of query rows
  using W = Wide<T>;
  using Value = Vec<W>;
  static constexpr int kStep = kLanes<W>;  // channels per vector
  template <class From>
  static VR_INLINE Value load_value(const From* from) {
    return load(from);
  }
  template <class From>
  static VR_INLINE Value part_value(const From* from, int64_t count) {
    return load_part(from, count);
  }
  static VR_INLINE Vec<W> multiply_add(Vec<W> sum, Value a, Value b) { return sum + a * b; }
};

#if defined(VREFLECTION_BF16_PAIRS)
// `Pairs`: the machine multiplies pairs of bfloat16 and adds both products to a float: twice the rate of `Plain`.
struct Pairs {
  using X = bf16;
  using Row = bf16;
  using W = float;
  using Value = Vector<float>::U;
  static constexpr int kStep = 2 * kLanes<float>;
  static VR_INLINE Value load_value(const void* from) {
    Value value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  }
  static VR_INLINE Value part_value(const bf16* from, int64_t count) {
    bf16 buffer[kStep] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
    return load_value(buffer);
  }
  static VR_INLINE Vec<float> multiply_add(Vec<float> sum, Value a, Value b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// kRows query rows against three tokens, over `depth` channels; adds to out[t * ld_out + r]. With kAhead it asks for
// the three tokens that come next, since the hardware does not foresee the jump to them.
template <class P, int kRows, bool kAhead>
void dot_tile(const typename P::X* const (&tokens)[3], const typename P::X* const (&next)[3], int num_tokens,
              const typename P::Row* rows, int64_t ld, int64_t depth, typename P::W* out, int64_t ld_out) {
  using W = typename P::W;
  using Value = typename P::Value;
  constexpr int L = kLanes<W>;
  Vec<W> sums[3][kRows] = {};
  int64_t k = 0;
  for (; k + P::kStep <= depth; k += P::kStep) {
    const Value a = P::load_value(tokens[0] + k), b = P::load_value(tokens[1] + k), c = P::load_value(tokens[2] + k);
    if constexpr (kAhead)
      for (int t = 0; t < 3; ++t) __builtin_prefetch(next[t] + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Value row = in_register(P::load_value(rows + r * ld + k));
      sums[0][r] = P::multiply_add(sums[0][r], a, row);
      sums[1][r] = P::multiply_add(sums[1][r], b, row);
      sums[2][r] = P::multiply_add(sums[2][r], c, row);
    }
  }
  if (k < depth) {
    for (int r = 0; r < kRows; ++r) {
      const Value row = P::part_value(rows + r * ld + k, depth - k);
      for (int t = 0; t < 3; ++t)
        sums[t][r] = P::multiply_add(sums[t][r], P::part_value(tokens[t] + k, depth - k), row);
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

template <class P, bool kAhead>
void dot_group(const typename P::X* const (&tokens)[3], const typename P::X* const (&next)[3], int num_tokens,
               const typename P::Row* rows, int64_t ld, int64_t num_rows, int64_t depth, typename P::W* out,
               int64_t ld_out) {
  if (num_rows >= kTileRows) {
    dot_tile<P, kTileRows, kAhead>(tokens, next, num_tokens, rows, ld, depth, out, ld_out);
    return;
  }
  int64_t r = 0;
  if (kTileRows > 4 && num_rows >= 4) {
    dot_tile<P, 4, kAhead>(tokens, next, num_tokens, rows, ld, depth, out, ld_out);
    r += 4;
  }
  if (num_rows - r >= 2) {
    dot_tile<P, 2, kAhead>(tokens, next, num_tokens, rows + r * ld, ld, depth, out + r, ld_out);
    r += 2;
  }
  if (num_rows - r >= 1) dot_tile<P, 1, kAhead>(tokens, next, num_tokens, rows + r * ld, ld, depth, out + r, ld_out);
}

template <class P>
void dot_rows(const typename P::X* tokens, const int64_t* offset, int64_t count, const typename P::X* rows,
              int64_t ld_rows, int64_t num_rows, int64_t width, typename P::W* out, int64_t ld_out,
              typename P::W* scratch) {
  using X = typename P::X;
  using Row = typename P::Row;
  using W = typename P::W;
  // The same number of bytes per row for each type of row.
  constexpr int64_t kBlock = kDotBlock * int64_t(sizeof(float)) / int64_t(sizeof(Row));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < num_rows; ++r) out[t * ld_out + r] = 0;
  for (int64_t k = 0; k < width; k += kBlock) {
    const int64_t depth = smaller(kBlock, width - k);
    const Row* block_rows;
    int64_t ld = ld_rows;
    if constexpr (sizeof(X) == sizeof(Row)) {
      block_rows = rows + k;
    } else {
      for (int64_t r = 0; r < num_rows; ++r) widen(rows + r * ld_rows + k, scratch + r * kBlock, depth);
      block_rows = scratch;
      ld = kBlock;
    }
    for (int64_t group = 0; group < num_rows; group += kTileRows) {
      const int64_t group_rows = smaller(kTileRows, num_rows - group);
      for (int64_t t = 0; t < count; t += 3) {
        const int64_t last = count - 1;
        const X* const tile[3] = {tokens + offset[t] + k, tokens + offset[smaller(t + 1, last)] + k,
                                  tokens + offset[smaller(t + 2, last)] + k};
        W* to = out + t * ld_out + group;
        const int tile_tokens = int(smaller(3, count - t));
        if (group > 0) {
          dot_group<P, false>(tile, tile, tile_tokens, block_rows + group * ld, ld, group_rows, depth, to, ld_out);
          continue;
        }
        // After the last tile come the next channels of the first one.
        const int64_t ahead = t + 3 < count ? t + 3 : 0;
        const int64_t channel = ahead > 0 || k + kBlock >= width ? k : k + kBlock;
        const X* const next[3] = {tokens + offset[ahead] + channel, tokens + offset[smaller(ahead + 1, last)] + channel,
                                  tokens + offset[smaller(ahead + 2, last)] + channel};
        dot_group<P, true>(tile, next, tile_tokens, block_rows, ld, group_rows, depth, to, ld_out);
      }
    }
  }
}

// Where a tile of `mix_rows` finds its tokens: packed beside each other, or in place.
template <class T>
struct Packed {
  const T* tile;
  VR_INLINE const T* row(int64_t n) const { return tile + n * 3 * kLanes<T>; }
};
template <class X>
struct InPlace {
  const X* tokens;
  const int64_t* offset;
  const int64_t* ahead;  // offsets of the tokens that come after this block
  VR_INLINE const X* row(int64_t n) const {
    const X* next = tokens + ahead[n];
    for (int v = 0; v < 3 * kLanes<Wide<X>>; v += 64 / int(sizeof(X))) __builtin_prefetch(next + v);
    return tokens + offset[n];
  }
};

// A weight times a vector of tokens; an integer weight is a pair of bfloat16, and so are the tokens then.
template <class W>
VR_INLINE Vec<W> add_weighted(Vec<W> sum, Vec<W> token, W weight) {
  return sum + token * weight;
}
#if defined(VREFLECTION_BF16_PAIRS)
VR_INLINE Vec<float> add_weighted(Vec<float> sum, Pairs::Value token, uint32_t weight) {
  return Pairs::multiply_add(sum, token, Pairs::Value{} + weight);
}
VR_INLINE Pairs::Value load(const uint32_t* from) { return Pairs::load_value(from); }
#endif

template <int kRows, class W, class Weight, class Source>
void mix_tile(const Weight* weights, int64_t ld, Source source, int64_t count, bool add, W* out,
              const int64_t* out_row) {
  constexpr int L = kLanes<W>;
  Vec<W> sums[kRows][3] = {};
  for (int64_t n = 0; n < count; ++n) {
    const auto* token = source.row(n);
    const auto a = load(token), b = load(token + L), c = load(token + 2 * L);
    const Weight* weight = weights + n * ld;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = add_weighted(sums[r][0], a, weight[r]);
      sums[r][1] = add_weighted(sums[r][1], b, weight[r]);
      sums[r][2] = add_weighted(sums[r][2], c, weight[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    W* to = out + out_row[r];
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) store<W>(to + v * L, add ? load(to + v * L) + sums[r][v] : sums[r][v]);
  }
}

template <class W, class Weight, class Source>
void mix_group(const Weight* weights, int64_t ld, int64_t num_rows, Source source, int64_t count, bool add, W* out,
               const int64_t* out_row) {
  int64_t r = 0;
  for (; r + kTileRows <= num_rows; r += kTileRows)
    mix_tile<kTileRows>(weights + r, ld, source, count, add, out, out_row + r);
  if (kTileRows > 4 && num_rows - r >= 4) {
    mix_tile<4>(weights + r, ld, source, count, add, out, out_row + r);
    r += 4;
  }
  if (num_rows - r >= 2) {
    mix_tile<2>(weights + r, ld, source, count, add, out, out_row + r);
    r += 2;
  }
  if (num_rows - r >= 1) mix_tile<1>(weights + r, ld, source, count, add, out, out_row + r);
}

template <class X>
VR_INLINE Vec<Wide<X>> load_columns_of(const X* token, int64_t left) {
  if (left >= kLanes<Wide<X>>) return load(token);
  return left > 0 ? load_part(token, left) : Vec<Wide<X>>{};
}

// What `mix_rows` reads after this tile: the next columns of the same tokens, or the first columns of the next block.
template <class X>
struct NextTile {
  const X* tokens;
  const int64_t* offset;
  int64_t columns;

  NextTile(const X* first, const int64_t* block_offset, int64_t c, int64_t part, int64_t width, int64_t depth,
           int64_t left)
      : tokens(c + part < width ? first + c + part : first),
        offset(c + part < width || left < 2 * depth ? block_offset : block_offset + depth),
        columns(c + part < width ? smaller(part, width - c - part) : smaller(part, width)) {}
  VR_INLINE void prefetch(int64_t n) const {
    for (int64_t c = 0; c < columns; c += 64 / int64_t(sizeof(X))) __builtin_prefetch(tokens + offset[n] + c);
  }
};

// Copies the next columns of a block of tokens beside each other, widened. Packing matters: rows of 14 KiB would all
// fall into the same few sets of the first-level cache.
template <class X>
void pack_tile(const X* tokens, const int64_t* offset, int64_t count, int64_t columns, const NextTile<X>& next,
               Wide<X>* packed) {
  using W = Wide<X>;
  constexpr int L = kLanes<W>;
  for (int64_t n = 0; n < count; ++n, packed += 3 * L) {
    const X* token = tokens + offset[n];
    next.prefetch(n);
    for (int v = 0; v < 3; ++v) store<W>(packed + v * L, load_columns_of(token + v * L, columns - v * L));
  }
}

template <class X>
void mix_rows(const Wide<X>* weights, int64_t ld_weights, int64_t num_rows, const X* tokens, const int64_t* offset,
              int64_t count, int64_t columns, bool add, Wide<X>* out, const int64_t* out_row) {
  using W = Wide<X>;
  constexpr int64_t kColumns = 3 * kLanes<W>;
  // Few rows use a token a few times only: a copy would not pay. Short blocks then, to walk along the rows.
  const bool in_place = num_rows <= kInPlaceRows;
  const int64_t block = in_place ? kInPlaceBlock : kMixBlock;
  alignas(64) W packed[kMixBlock * kColumns];
  for (int64_t n = 0; n < count; n += block) {
    const int64_t depth = smaller(block, count - n);
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t part = smaller(kColumns, columns - c);
      const W* block_weights = weights + n * ld_weights;
      const bool adds = add || n > 0;
      if (in_place && part == kColumns) {
        const int64_t* ahead = count - n >= 2 * block ? offset + n + block : offset + n;
        mix_group(block_weights, ld_weights, num_rows, InPlace<X>{tokens + c, offset + n, ahead}, depth, adds, out + c,
                  out_row);
      } else {
        const NextTile<X> next(tokens, offset + n, c, part, columns, depth, count - n);
        pack_tile(tokens + c, offset + n, depth, part, next, packed);
        mix_group(block_weights, ld_weights, num_rows, Packed<W>{packed}, depth, adds, out + c, out_row);
      }
    }
  }
}

#if defined(VREFLECTION_BF16_PAIRS)
#include "cpu_products_bf16.h"
#endif

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

}  // namespace
}  // namespace vreflection::VREFLECTION_ISA
