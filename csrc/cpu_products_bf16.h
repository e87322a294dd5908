// `mix_rows` on pairs of bfloat16: weights are rounded to bfloat16, as in PyTorch's own product of two bfloat16
// matrices, and both they and the tokens are laid out in pairs of neighbouring keys. Included by cpu_products.h, in its
// namespace.
constexpr int64_t kPairRows = 64;  // weights are paired for this many rows at a time

// (weight of key n, weight of key n + 1) per row, for a block of keys; an odd last key is paired with zeros.
inline void pair_weights(const float* weights, int64_t ld, int64_t num_rows, int64_t count, uint32_t* pairs) {
  constexpr int L = kLanes<float>;
  for (int64_t n = 0; n < count; n += 2, pairs += kPairRows) {
    for (int64_t r = 0; r < num_rows; r += L) {
      const float* first = weights + n * ld + r;
      const int64_t part = num_rows - r;
      const Vec<float> a = load_columns_of(first, part);
      const Vec<float> b = n + 1 < count ? load_columns_of(first + ld, part) : Vec<float>{};
      const Pairs::Value pair = bf16_bits(a) | (bf16_bits(b) << 16);
      __builtin_memcpy(pairs + r, &pair, sizeof pair);  // kPairRows is a multiple of L
    }
  }
}

// Bits of the next columns, in the low half of each lane.
VR_INLINE Pairs::Value column_bits(const bf16* token, int64_t left) {
  return (Pairs::Value)load_columns_of(token, left) >> 16;
}

inline void pack_pairs(const bf16* tokens, const int64_t* offset, int64_t count, int64_t columns,
                       const NextTile<bf16>& next, uint32_t* packed) {
  constexpr int L = kLanes<float>;
  for (int64_t n = 0; n < count; n += 2) {
    const bf16* first = tokens + offset[n];
    const bf16* second = n + 1 < count ? tokens + offset[n + 1] : nullptr;
    next.prefetch(n);
    if (second) next.prefetch(n + 1);
    for (int v = 0; v < 3; ++v, packed += L) {
      const int64_t left = columns - v * L;
      const Pairs::Value low = column_bits(first + v * L, left);
      const Pairs::Value high = second ? column_bits(second + v * L, left) : Pairs::Value{};
      const Pairs::Value pair = low | (high << 16);
      __builtin_memcpy(packed, &pair, sizeof pair);
    }
  }
}

inline void mix_rows_in_pairs(const float* weights, int64_t ld_weights, int64_t num_rows, const bf16* tokens,
                              const int64_t* offset, int64_t count, int64_t columns, bool add, float* out,
                              const int64_t* out_row) {
  constexpr int64_t kColumns = 3 * kLanes<float>, kBlock = 2 * kMixBlock;
  alignas(64) uint32_t packed[kMixBlock * kColumns];
  alignas(64) uint32_t pairs[kMixBlock * kPairRows];
  // Few rows: short blocks, to walk along the rows of a large matrix.
  const int64_t block = num_rows <= 2 * kTileRows ? 32 : kBlock;
  for (int64_t n = 0; n < count; n += block) {
    const int64_t depth = smaller(block, count - n), num_pairs = (depth + 1) / 2;
    for (int64_t r = 0; r < num_rows; r += kPairRows) {
      const int64_t rows = smaller(kPairRows, num_rows - r);
      pair_weights(weights + n * ld_weights + r, ld_weights, rows, depth, pairs);
      for (int64_t c = 0; c < columns; c += kColumns) {
        const int64_t part = smaller(kColumns, columns - c);
        const NextTile<bf16> next(tokens, offset + n, c, part, columns, depth, count - n);
        pack_pairs(tokens + c, offset + n, depth, part, next, packed);
        mix_group(pairs, kPairRows, rows, Packed<uint32_t>{packed}, num_pairs, add || n > 0, out + c, out_row + r);
      }
    }
  }
}
