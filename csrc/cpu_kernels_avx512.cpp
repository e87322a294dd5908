// Vector kernels for AVX-512. The pragma follows the headers, so that nothing of theirs is compiled for it.
#include "cpu_kernels.h"

#if defined(VREFLECTION_X86_TABLES)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define VREFLECTION_ISA avx512
#define VREFLECTION_VECTOR_BYTES 64
#define VREFLECTION_TILE_ROWS 8  // 8 x 3 accumulators of 32 registers
#include "cpu_kernels_impl.h"
#endif
