// `roi_align` and its transpose: the separable sparse map of each box applied to all channels.
#include "region_products.h"

namespace vreflection {
namespace {

constexpr int64_t kColumns = 256;  // channels per task: the rows between the two passes stay in the second-level cache
constexpr int64_t kGradientColumns = 128;

// (P, used_columns) x channels between the passes, then cells.
template <class X>
void align_box(const Regions& regions, int64_t b, const X* tokens, const std::vector<int64_t>& offset, int64_t columns,
               Wide<X>* between, Wide<X>* cell, X* out, int64_t ld_out) {
  using W = Wide<X>;
  const Region& box = regions.boxes[b];
  for (int64_t py = 0; py < regions.side; ++py) {
    std::fill_n(between, box.used_columns * columns, W(0));
    for (const Tap* y = regions.taps_from(b, 0, py); y != regions.taps_to(b, 0, py); ++y)
      for (int64_t x = 0; x < box.used_columns; ++x)
        kernels<X>().add_scaled_tokens(
            between + x * columns, tokens + offset[box.begin + y->index * box.used_columns + x], W(y->weight), columns);
    for (int64_t px = 0; px < regions.side; ++px) {
      std::fill_n(cell, columns, W(0));
      for (const Tap* x = regions.taps_from(b, 1, px); x != regions.taps_to(b, 1, px); ++x)
        kernels<X>().add_scaled(cell, between + x->index * columns, W(x->weight), columns);
      kernels<X>().narrow(cell, out + (py * regions.side + px) * ld_out, columns);
    }
  }
}

int64_t widest(const Regions& regions) {
  int64_t columns = 1;
  for (const Region& box : regions.boxes) columns = std::max(columns, box.used_columns);
  return columns;
}

Tensor roi_align(Tensor tokens, Tensor spans, Tensor tap_index, Tensor tap_weight) {
  check_tokens(tokens);
  const Regions regions = plan_regions(spans, tap_index, tap_weight, tokens.size(0));
  const int64_t width = tokens.size(1), num_cells = regions.side * regions.side;
  const Tensor out = torch::stable::new_empty(tokens, {regions.num_boxes(), num_cells, width});
  with_storage(tokens, "tokens", [&](auto* storage) {
    using X = std::remove_pointer_t<decltype(storage)>;
    const std::vector<int64_t> offset = regions.offsets(tokens.stride(0));
    const int64_t chunks = divide_up(width, kColumns), num_tasks = regions.num_boxes() * chunks;
    const int64_t workers = worker_count(num_tasks), size = (widest(regions) + 1) * kColumns;
    const Workspace<Wide<X>> scratch(workers * size);
    run_tasks(num_tasks, workers, [&](int64_t worker, int64_t task) {
      const int64_t b = task / chunks, column = task % chunks * kColumns;
      Wide<X>* mine = scratch.data() + worker * size;
      align_box<X>(regions, b, data_of<X>(tokens) + column, offset, std::min(kColumns, width - column), mine,
                   mine + size - kColumns, mutable_data_of<X>(out) + b * num_cells * width + column, width);
    });
  });
  return out;
}

// The transpose for one box and some channels; adds to `sums` (T, columns).
template <class X>
void align_box_backward(const Regions& regions, int64_t b, const X* grad, int64_t ld, int64_t columns, Wide<X>* between,
                        Wide<X>* sums) {
  using W = Wide<X>;
  const Region& box = regions.boxes[b];
  for (int64_t py = 0; py < regions.side; ++py) {
    std::fill_n(between, box.used_columns * columns, W(0));
    for (int64_t px = 0; px < regions.side; ++px)
      for (const Tap* x = regions.taps_from(b, 1, px); x != regions.taps_to(b, 1, px); ++x)
        kernels<X>().add_scaled_tokens(between + x->index * columns, grad + (py * regions.side + px) * ld, W(x->weight),
                                       columns);
    for (const Tap* y = regions.taps_from(b, 0, py); y != regions.taps_to(b, 0, py); ++y)
      for (int64_t x = 0; x < box.used_columns; ++x)
        kernels<X>().add_scaled(sums + regions.token[box.begin + y->index * box.used_columns + x] * columns,
                                between + x * columns, W(y->weight), columns);
  }
}

Tensor roi_align_backward(Tensor grad_any, Tensor spans, Tensor tap_index, Tensor tap_weight, int64_t num_tokens) {
  const Regions regions = plan_regions(spans, tap_index, tap_weight, num_tokens);
  const int64_t num_cells = regions.side * regions.side;
  check_dim(grad_any, 3, "grad");
  check_size(grad_any, 0, regions.num_boxes(), "grad");
  check_size(grad_any, 1, num_cells, "grad");
  const Tensor grad = torch::stable::contiguous(grad_any);
  const int64_t width = grad.size(2);
  const Tensor out = torch::stable::new_empty(grad, {num_tokens, width});
  with_storage(grad, "grad", [&](auto* storage) {
    using X = std::remove_pointer_t<decltype(storage)>;
    using W = Wide<X>;
    // A task owns some channels of every token, and takes the boxes in order.
    const int64_t num_tasks = divide_up(width, kGradientColumns), workers = worker_count(num_tasks);
    const int64_t size = (widest(regions) + num_tokens) * kGradientColumns;
    const Workspace<W> scratch(workers * size);
    run_tasks(num_tasks, workers, [&](int64_t worker, int64_t task) {
      const int64_t column = task * kGradientColumns, columns = std::min(kGradientColumns, width - column);
      W* sums = scratch.data() + worker * size;
      W* between = sums + num_tokens * kGradientColumns;
      std::fill_n(sums, num_tokens * columns, W(0));
      for (int64_t b = 0; b < regions.num_boxes(); ++b)
        align_box_backward<X>(regions, b, data_of<X>(grad) + b * num_cells * width + column, width, columns, between,
                              sums);
      for (int64_t t = 0; t < num_tokens; ++t)
        kernels<X>().narrow(sums + t * columns, mutable_data_of<X>(out) + t * width + column, columns);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vreflection, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace vreflection
