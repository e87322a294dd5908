// `device_loop_*`: a captured CUDA graph repeated on the device until a flag in memory is zero. One launch, no host:
//
//   graph: [ WHILE node: body = [ copy of the captured graph ] -> [ set the condition from the flag ] ]
//
// The body runs once before the flag is first read. Conditional nodes need CUDA 12.4, in the toolkit and in the driver.
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda_calls.h"

namespace vreflection {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

#if CUDART_VERSION >= 12040

__global__ void continue_while_kernel(cudaGraphConditionalHandle condition, const volatile int32_t* running) {
  cudaGraphSetConditional(condition, *running != 0);
}

struct Loop {
  int32_t device = 0;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;

  explicit Loop(int32_t on) : device(on) {}
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  // A launch under way finishes first: CUDA frees an executable graph in flight when it is done.
  ~Loop() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
};

// Integers given out to Python; they count up, so that a stale one is found out.
struct Register {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Loop>> loops;
  int64_t last = 0;
};

Register& known() {
  static auto* loops = new Register;  // never destroyed: at exit the driver may be gone before it
  return *loops;
}

std::shared_ptr<Loop> find_loop(int64_t loop) {
  std::lock_guard<std::mutex> lock(known().mutex);
  const auto found = known().loops.find(loop);
  STD_TORCH_CHECK(found != known().loops.end(), "device_loop: no loop ", loop, "; it was destroyed or never created");
  return found->second;
}

// Adds the WHILE node to `graph` and returns its empty body.
cudaGraph_t add_while(cudaGraph_t graph, cudaGraphConditionalHandle condition) {
  cudaGraphNodeParams node = {};
  node.type = cudaGraphNodeTypeConditional;
  node.conditional.handle = condition;
  node.conditional.type = cudaGraphCondTypeWhile;
  node.conditional.size = 1;
  cudaGraphNode_t added;
#if CUDART_VERSION >= 13000
  check_cuda(cudaGraphAddNode(&added, graph, nullptr, nullptr, 0, &node), "cudaGraphAddNode (WHILE)");
#else
  check_cuda(cudaGraphAddNode(&added, graph, nullptr, 0, &node), "cudaGraphAddNode (WHILE)");
#endif
  return node.conditional.phGraph_out[0];
}

int64_t device_loop_create(int64_t graph, Tensor running) {
  STD_TORCH_CHECK(running.is_cuda() && running.scalar_type() == ScalarType::Int && running.numel() == 1,
                  "device_loop_create: expected running to be one int32 on a CUDA device");
  STD_TORCH_CHECK(graph != 0, "device_loop_create: expected a captured graph (CUDAGraph.raw_cuda_graph()), got 0");
  const auto step = reinterpret_cast<cudaGraph_t>(static_cast<uintptr_t>(graph));
  const DeviceGuard guard(running.get_device());
  size_t nodes = 0;
  check_cuda(cudaGraphGetNodes(step, nullptr, &nodes), "cudaGraphGetNodes");
  STD_TORCH_CHECK(nodes > 0, "device_loop_create: the captured graph is empty, the loop would never end");

  auto loop = std::make_shared<Loop>(running.get_device());
  check_cuda(cudaGraphCreate(&loop->graph, 0), "cudaGraphCreate");
  cudaGraphConditionalHandle condition;
  check_cuda(cudaGraphConditionalHandleCreate(&condition, loop->graph, 1, cudaGraphCondAssignDefault),
             "cudaGraphConditionalHandleCreate");
  const cudaGraph_t body = add_while(loop->graph, condition);
  cudaGraphNode_t copy, check;
  check_cuda(cudaGraphAddChildGraphNode(&copy, body, nullptr, 0, step), "cudaGraphAddChildGraphNode");
  const auto* flag = static_cast<const volatile int32_t*>(running.const_data_ptr());
  void* arguments[] = {&condition, &flag};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(&continue_while_kernel);
  kernel.gridDim = kernel.blockDim = dim3(1);
  kernel.kernelParams = arguments;
  check_cuda(cudaGraphAddKernelNode(&check, body, &copy, 1, &kernel), "cudaGraphAddKernelNode");
  check_cuda(cudaGraphInstantiate(&loop->executable, loop->graph, 0), "cudaGraphInstantiate");

  std::lock_guard<std::mutex> lock(known().mutex);
  known().loops[++known().last] = std::move(loop);
  return known().last;
}

void device_loop_launch(int64_t loop, Tensor on_device) {
  const auto found = find_loop(loop);
  STD_TORCH_CHECK(on_device.is_cuda() && on_device.get_device() == found->device,
                  "device_loop_launch: the loop was created on CUDA device ", found->device);
  const DeviceGuard guard(found->device);
  check_cuda(cudaGraphLaunch(found->executable, current_stream(found->device)), "cudaGraphLaunch");
}

void device_loop_destroy(int64_t loop) {
  const auto found = find_loop(loop);
  std::lock_guard<std::mutex> lock(known().mutex);
  known().loops.erase(loop);
}

int64_t device_loop_support() {
  int driver = 0, devices = 0;
  // The second call fails where the driver is older than the CUDA runtime of this library.
  const bool works = cudaDriverGetVersion(&driver) == cudaSuccess && cudaGetDeviceCount(&devices) == cudaSuccess;
  cudaGetLastError();
  return works ? driver : 0;
}

#else

constexpr char kTooOld[] = "device_loop: built with CUDA older than 12.4, which has no conditional graph nodes";

int64_t device_loop_create(int64_t, Tensor) {
  STD_TORCH_CHECK(false, kTooOld);
  return 0;
}
void device_loop_launch(int64_t, Tensor) { STD_TORCH_CHECK(false, kTooOld); }
void device_loop_destroy(int64_t) { STD_TORCH_CHECK(false, kTooOld); }
int64_t device_loop_support() { return 0; }

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vreflection, m) {
  // `graph`: a `cudaGraph_t`; copied, so it may go afterwards, but the memory it names must stay.
  m.def("device_loop_create(int graph, Tensor running) -> int");
  // On the current stream of `on_device`'s device.
  m.def("device_loop_launch(int loop, Tensor on_device) -> ()");
  m.def("device_loop_destroy(int loop) -> ()");
  // The driver's version (12080 is 12.8); 0 where this library cannot run loops.
  m.def("device_loop_support() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(vreflection, CUDA, m) {
  m.impl("device_loop_create", TORCH_BOX(&device_loop_create));
  m.impl("device_loop_launch", TORCH_BOX(&device_loop_launch));
}
STABLE_TORCH_LIBRARY_IMPL(vreflection, CompositeExplicitAutograd, m) {
  m.impl("device_loop_destroy", TORCH_BOX(&device_loop_destroy));
  m.impl("device_loop_support", TORCH_BOX(&device_loop_support));
}

}  // namespace vreflection
