// Chooses the instruction set once per process.
#include "cpu_kernels.h"

#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/Exception.h>

namespace vreflection {
namespace {

enum class Isa { generic, avx2, avx512 };

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VREFLECTION_HAS_X86_TABLES 1
Isa best_isa() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::generic;
}
#else
Isa best_isa() { return Isa::generic; }
#endif

Isa chosen_isa() {
  const char* asked = std::getenv("VREFLECTION_CPU_ISA");
  const Isa best = best_isa();
  if (asked == nullptr || *asked == '\0') return best;
  const char* names[] = {"generic", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(asked, names[i]) != 0) continue;
    STD_TORCH_CHECK(i <= int(best), "VREFLECTION_CPU_ISA: this machine and build go up to ", names[int(best)], ", got ",
                    asked);
    return Isa(i);
  }
  STD_TORCH_CHECK(false, "VREFLECTION_CPU_ISA: expected generic, avx2 or avx512, got ", asked);
  return best;
}

Isa the_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace

template <class X>
const Kernels<X>& kernels() {
  const Isa isa = the_isa();
#if defined(VREFLECTION_HAS_X86_TABLES)
  if (isa == Isa::avx512) return avx512::table<X>();
  if (isa == Isa::avx2) return avx2::table<X>();
#endif
  return generic::table<X>();
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<bf16>& kernels<bf16>();

}  // namespace vreflection
