// Shared by the CUDA operators: a call that fails says which one it was; torch's current stream.
#pragma once

#include <cstdint>
#include <dlfcn.h>

#include <cuda_runtime.h>

#include <torch/csrc/stable/tensor.h>

namespace vreflection {

inline void check_cuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // reported here, so that the next call does not report it again
  STD_TORCH_CHECK(false, call, ": ", cudaGetErrorString(code));
}

// The shim lives in a library that a CPU-only torch lacks, so it is looked up when it is needed, not when linking.
inline cudaStream_t current_stream(int32_t device) {
  using Shim = int32_t (*)(int32_t, void**);
  static const Shim shim = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Shim>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(shim != nullptr && shim(device, &stream) == 0, "torch gave no current CUDA stream for ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace vreflection
