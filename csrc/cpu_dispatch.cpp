// Chooses the instruction set once per process.
#include "cpu_kernels.h"

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/Exception.h>

namespace vreflection {
namespace {

enum class Isa { generic, avx2, avx512, avx512bf16 };
constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};

#if defined(VREFLECTION_X86_TABLES)
Isa best_isa() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
}
#else
Isa best_isa() { return Isa::generic; }
#endif

Isa chosen_isa() {
  const char* asked = std::getenv("VREFLECTION_CPU_ISA");
  const Isa best = best_isa();
  if (asked == nullptr || *asked == '\0') return best;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(asked, kNames[i]) != 0) continue;
    STD_TORCH_CHECK(i <= int(best), "VREFLECTION_CPU_ISA: this machine and build go up to ", kNames[int(best)],
                    ", got ", asked);
    return Isa(i);
  }
  STD_TORCH_CHECK(false, "VREFLECTION_CPU_ISA: expected generic, avx2, avx512 or avx512bf16, got ", asked);
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
#if defined(VREFLECTION_X86_TABLES)
  if constexpr (std::is_same_v<X, bf16>) {
    if (isa == Isa::avx512bf16) return avx512bf16::pair_table();
  }
  if (isa >= Isa::avx512) return avx512::table<X>();
  if (isa == Isa::avx2) return avx2::table<X>();
#endif
  return generic::table<X>();
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<bf16>& kernels<bf16>();

}  // namespace vreflection
