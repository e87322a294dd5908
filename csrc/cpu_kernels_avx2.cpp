// Vector kernels for AVX2 and FMA. The pragma follows the headers, so that nothing of theirs is compiled for it.
#include "cpu_kernels.h"

#if defined(VREFLECTION_X86_TABLES)
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#define VREFLECTION_ISA avx2
#define VREFLECTION_VECTOR_BYTES 32
#define VREFLECTION_TILE_ROWS 4  // 4 x 3 accumulators of 16 registers
#include "cpu_kernels_impl.h"
#endif
