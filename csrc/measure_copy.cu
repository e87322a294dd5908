// `measure_copy`: a plain device copy at full memory width. Benchmarks divide by its time, so that the ceiling they
// report was measured on the same device in the same run.
#include <cstdint>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_calls.h"

namespace vreflection {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 512;
constexpr int kBlocksPerProcessor = 4;  // 2048 threads: all that one multiprocessor holds
constexpr int kUnroll = 4;              // loads in flight per thread before the first store

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const uint4* __restrict__ from, uint4* __restrict__ to, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    uint4 value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) value[u] = __ldcs(from + i + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) __stcs(to + i + u * step, value[u]);
  }
  for (; i < count; i += step) __stcs(to + i, __ldcs(from + i));
}

// Copies the bytes of `src` to `dst`, on the current stream.
void measure_copy(Tensor dst, Tensor src) {
  const int64_t bytes = src.numel() * int64_t(src.element_size());
  STD_TORCH_CHECK(dst.is_cuda() && src.is_cuda() && dst.get_device() == src.get_device(),
                  "measure_copy: expected two tensors on one CUDA device");
  STD_TORCH_CHECK(dst.is_contiguous() && src.is_contiguous(), "measure_copy: expected contiguous tensors");
  STD_TORCH_CHECK(dst.numel() * int64_t(dst.element_size()) == bytes, "measure_copy: expected dst of ", bytes,
                  " bytes, got ", dst.numel() * int64_t(dst.element_size()));
  const auto from = reinterpret_cast<uintptr_t>(src.const_data_ptr());
  const auto to = reinterpret_cast<uintptr_t>(dst.mutable_data_ptr());
  STD_TORCH_CHECK(bytes % 16 == 0 && from % 16 == 0 && to % 16 == 0,
                  "measure_copy: expected sizes and addresses in multiples of 16 bytes, got ", bytes, " bytes");
  if (bytes == 0) return;
  const int32_t device = src.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  copy_kernel<<<processors * kBlocksPerProcessor, kThreads, 0, current_stream(device)>>>(
      reinterpret_cast<const uint4*>(from), reinterpret_cast<uint4*>(to), bytes / 16);
  check_cuda(cudaGetLastError(), "measure_copy: launch");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vreflection, m) { m.def("measure_copy(Tensor(a!) dst, Tensor src) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(vreflection, CUDA, m) { m.impl("measure_copy", TORCH_BOX(&measure_copy)); }

}  // namespace vreflection
