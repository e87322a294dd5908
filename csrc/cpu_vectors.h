// Vectors of one instruction set: loads, stores, sums over lanes, exponential. Included by cpu_kernels_impl.h only.
namespace vreflection::VREFLECTION_ISA {
namespace {

#define VR_INLINE inline __attribute__((always_inline))

constexpr int kBytes = VREFLECTION_VECTOR_BYTES;
constexpr int kTileRows = VREFLECTION_TILE_ROWS;  // tile of accumulators: kTileRows x 3 vectors

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
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

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
// bfloat16 bits in the low half of each lane: round to nearest even; a NaN stays a NaN.
VR_INLINE Vector<float>::U bf16_bits(Vec<float> value) {
  typedef Vector<float>::U U;
  const U bits = (U)value;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return ((U)(value == value) & rounded) | (~(U)(value == value) & 0x7fc0u);
}
VR_INLINE void store(bf16* to, Vec<float> value) {
  const Vector<float>::H half = __builtin_convertvector(bf16_bits(value), Vector<float>::H);
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

#if defined(__AVX512F__)
VR_INLINE void stream(float* to, Vec<float> value) { _mm512_stream_ps(to, (__m512)value); }
#elif defined(__AVX2__)
VR_INLINE void stream(float* to, Vec<float> value) { _mm256_stream_ps(to, (__m256)value); }
#else
VR_INLINE void stream(float* to, Vec<float> value) { store<float>(to, value); }
#endif
VR_INLINE void stream(double* to, Vec<double> value) { store<double>(to, value); }
#if defined(__AVX512F__)
VR_INLINE void stream(bf16* to, Vec<float> value) {
  bf16 buffer[kLanes<float>];
  store(buffer, value);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
}
#else
VR_INLINE void stream(bf16* to, Vec<float> value) { store(to, value); }
#endif

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

}  // namespace
}  // namespace vreflection::VREFLECTION_ISA
