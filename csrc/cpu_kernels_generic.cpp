// Vector kernels for the compiler's baseline: SSE2 on x86-64, NEON on ARM64.
#define VREFLECTION_ISA generic
#define VREFLECTION_VECTOR_BYTES 16
#if defined(__aarch64__)
#define VREFLECTION_TILE_ROWS 8  // 8 x 3 accumulators of 32 registers
#else
#define VREFLECTION_TILE_ROWS 4
#endif
#include "cpu_kernels_impl.h"
