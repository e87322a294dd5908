// Vector kernels for bfloat16 where AVX-512 multiplies pairs of it. The pragma follows the headers, so that nothing of
// theirs is compiled for it.
#include "cpu_kernels.h"

#if defined(VREFLECTION_X86_TABLES)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#define VREFLECTION_ISA avx512bf16
#define VREFLECTION_VECTOR_BYTES 64
#define VREFLECTION_TILE_ROWS 8  // 8 x 3 accumulators of 32 registers
#define VREFLECTION_BF16_PAIRS 1
#include "cpu_kernels_impl.h"
#endif
