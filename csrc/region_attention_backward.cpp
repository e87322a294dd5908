// `attend_backward`: gradients of the query rows and of the tokens.
#include "region_products.h"

namespace vreflection {
namespace {

// grad (keys, ld) := gradient of the scores, from the gradient of the weights.
template <class X>
void softmax_backward_regions(const Regions& regions, Wide<X>* grad, int64_t ld, int64_t num_rows,
                              const Wide<X>* weights, const Wide<X>* cells) {
  using W = Wide<X>;
  if (!regions.has_cells) {
    constexpr int64_t kColumns = 64 / sizeof(W);
    const int64_t blocks = divide_up(num_rows, kColumns), num_tasks = regions.num_boxes() * blocks;
    run_tasks(num_tasks, worker_count(num_tasks), [&](int64_t, int64_t task) {
      const Region& box = regions.boxes[task / blocks];
      const int64_t column = task % blocks * kColumns;
      // Without a map the packed axis and the axis of keys are the same.
      kernels<X>().softmax_backward_columns(grad + box.begin * ld + column, ld, weights + box.begin * num_rows + column,
                                            num_rows, box.keys, std::min(kColumns, num_rows - column));
    });
    return;
  }
  const int64_t num_tasks = regions.num_boxes(), workers = worker_count(num_tasks);
  const int64_t num_cells = regions.side * regions.side, size = between_size(regions, num_rows);
  const Workspace<W> scratch(workers * (size + num_cells * num_rows));
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t b) {
    W* values = grad + regions.boxes[b].begin * ld;
    W* between = scratch.data() + worker * (size + num_cells * num_rows);
    W* box_cells = between + size;
    sample_cells<X>(regions, b, values, ld, num_rows, between, box_cells);
    kernels<X>().softmax_backward_columns(box_cells, num_rows, cells + b * num_cells * num_rows, num_rows, num_cells,
                                          num_rows);
    splat_cells<X>(regions, b, box_cells, num_rows, between, values, ld);
  });
}

template <class W>
void add_map_gradient(const Regions& regions, const W* grad_maps, int64_t heads, int64_t num_rows, W* grad,
                      int64_t ld) {
  const int64_t queries = num_rows / heads, num_tasks = regions.num_boxes();
  run_tasks(num_tasks, worker_count(num_tasks), [&](int64_t, int64_t b) {
    const Region& box = regions.boxes[b];
    for (int64_t key = box.begin; key < box.begin + box.keys; ++key) {
      const W* map = grad_maps + regions.packed[key] * queries;
      for (int64_t r = 0; r < num_rows; ++r) grad[key * ld + r] += map[r % queries] / W(heads);
    }
  });
}

// Keys by the block of tokens that they lie in; within a block in key order, so in box order.
struct TokenBlocks {
  std::vector<int64_t> begin, key;
};
TokenBlocks keys_by_block(const Regions& regions, int64_t num_blocks) {
  TokenBlocks blocks{std::vector<int64_t>(num_blocks + 1, 0), std::vector<int64_t>(regions.num_keys())};
  for (const int64_t token : regions.token) ++blocks.begin[token / kGradTokens + 1];
  for (int64_t i = 0; i < num_blocks; ++i) blocks.begin[i + 1] += blocks.begin[i];
  std::vector<int64_t> next(blocks.begin.begin(), blocks.begin.end() - 1);
  for (int64_t key = 0; key < regions.num_keys(); ++key) blocks.key[next[regions.token[key] / kGradTokens]++] = key;
  return blocks;
}

// Everything that the gradient of the tokens is made of: weights x grad_context + score gradient x rows.
template <class X>
struct TokenGradient {
  const Regions& regions;
  const TokenBlocks& blocks;
  const Wide<X>* weights;  // (S, R)
  const Wide<X>* grad_scores;
  int64_t ld_scores, num_rows, width;
  RowSource<X> grad_context, rows;
  std::vector<int64_t> row_offset;
};

// Adds one box's share to the tokens of one block: `count` keys from `keys`, at `out_row` of the block.
template <class X>
void add_box(const TokenGradient<X>& call, int64_t box, const int64_t* keys, int64_t count, int64_t column,
             int64_t columns, const int64_t* out_row, Wide<X>* turned, Wide<X>* block) {
  const int64_t num_rows = call.num_rows;
  Wide<X>* weights = turned;                         // [R, count]
  Wide<X>* grads = turned + num_rows * kGradTokens;  // [R, count]
  for (int64_t i = 0; i < count; ++i) {
    const Wide<X>* weight = call.weights + call.regions.packed[keys[i]] * num_rows;
    const Wide<X>* grad = call.grad_scores + keys[i] * call.ld_scores;
    for (int64_t r = 0; r < num_rows; ++r) {
      weights[r * count + i] = weight[r];
      grads[r * count + i] = grad[r];
    }
  }
  const int64_t* offset = call.row_offset.data();
  const X* context = call.grad_context.data + box * call.grad_context.box_rows + column;
  const X* rows = call.rows.data + box * call.rows.box_rows + column;
  kernels<X>().mix_rows(weights, count, count, context, offset, num_rows, columns, true, block, out_row);
  kernels<X>().mix_rows(grads, count, count, rows, offset, num_rows, columns, true, block, out_row);
}

template <class X>
void token_gradient(const TokenGradient<X>& call, int64_t num_tokens, X* out) {
  using W = Wide<X>;
  const int64_t chunks = divide_up(call.width, kGradColumns);
  const int64_t num_tasks = divide_up(num_tokens, kGradTokens) * chunks, workers = worker_count(num_tasks);
  const int64_t block_size = kGradTokens * kGradColumns, turned_size = 2 * call.num_rows * kGradTokens;
  const Workspace<W> scratch(workers * (block_size + turned_size));
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t task) {
    const int64_t i = task / chunks, column = task % chunks * kGradColumns;
    const int64_t columns = std::min(kGradColumns, call.width - column), first = i * kGradTokens;
    W* block = scratch.data() + worker * (block_size + turned_size);
    std::fill(block, block + block_size, W(0));
    const int64_t* key = call.blocks.key.data() + call.blocks.begin[i];
    const int64_t* end = call.blocks.key.data() + call.blocks.begin[i + 1];
    int64_t box = 0;
    int64_t out_row[kGradTokens];
    while (key != end) {
      while (*key >= call.regions.boxes[box].begin + call.regions.boxes[box].keys) ++box;
      // A run is bounded for `out_row`: a box of stride below its width holds tokens more than once.
      int64_t count = 0;
      const int64_t box_end = call.regions.boxes[box].begin + call.regions.boxes[box].keys;
      for (; key + count != end && key[count] < box_end && count < kGradTokens; ++count)
        out_row[count] = (call.regions.token[key[count]] - first) * kGradColumns;
      add_box<X>(call, box, key, count, column, columns, out_row, block + block_size, block);
      key += count;
    }
    const int64_t last = std::min(first + kGradTokens, num_tokens);
    for (int64_t t = first; t < last; ++t)
      kernels<X>().narrow(block + (t - first) * kGradColumns, out + t * call.width + column, columns);
  });
}

struct BackwardInputs {
  Tensor grad_context, rows, tokens, weights, cells;
  std::optional<Tensor> grad_maps;
  int64_t map_heads;
};

template <class X>
void attend_backward_typed(const Regions& regions, const BackwardInputs& in, const std::optional<Tensor>& grad_rows,
                           const std::optional<Tensor>& grad_tokens) {
  using W = Wide<X>;
  const int64_t num_rows = in.rows.size(1), width = in.rows.size(2), ld = round_up(num_rows, kRowPad);
  const bool shared = in.rows.size(0) == 1;
  const X* tokens = data_of<X>(in.tokens);
  const std::vector<int64_t> offset = regions.offsets(in.tokens.stride(0));
  const RowSource<X> context{data_of<X>(in.grad_context), num_rows * width};
  const Workspace<W> grad(regions.num_keys() * ld);
  dot_regions<X>(regions, tokens, offset, context, num_rows, width, grad.data(), ld);
  if (in.grad_maps.has_value())
    add_map_gradient<W>(regions, data_of<W>(*in.grad_maps), in.map_heads, num_rows, grad.data(), ld);
  softmax_backward_regions<X>(regions, grad.data(), ld, num_rows, data_of<W>(in.weights), data_of<W>(in.cells));
  if (grad_rows.has_value())
    mix_regions<X>(regions, grad.data(), ld, tokens, offset, num_rows, width, shared, mutable_data_of<X>(*grad_rows));
  if (!grad_tokens.has_value()) return;
  const int64_t num_tokens = in.tokens.size(0);
  const TokenBlocks blocks = keys_by_block(regions, divide_up(num_tokens, kGradTokens));
  TokenGradient<X> call{regions,
                        blocks,
                        data_of<W>(in.weights),
                        grad.data(),
                        ld,
                        num_rows,
                        width,
                        context,
                        RowSource<X>{data_of<X>(in.rows), shared ? 0 : num_rows * width},
                        std::vector<int64_t>(num_rows)};
  for (int64_t r = 0; r < num_rows; ++r) call.row_offset[r] = r * width;
  token_gradient<X>(call, num_tokens, mutable_data_of<X>(*grad_tokens));
}

void check_backward(const Regions& regions, const BackwardInputs& in) {
  const int64_t num_boxes = regions.num_boxes(), num_rows = in.rows.size(1), width = in.tokens.size(1);
  const ScalarType type = in.tokens.scalar_type(), wide = wide_type(type);
  STD_TORCH_CHECK(in.rows.size(0) == 1 || in.rows.size(0) == num_boxes, "rows: expected 1 or ", num_boxes,
                  " on axis 0, got ", in.rows.size(0));
  check_size(in.rows, 2, width, "rows");
  check_type(in.rows, type, "rows");
  check_dim(in.grad_context, 3, "grad_context");
  check_type(in.grad_context, type, "grad_context");
  const int64_t shape[] = {num_boxes, num_rows, width};
  for (int64_t axis = 0; axis < 3; ++axis) check_size(in.grad_context, axis, shape[axis], "grad_context");
  check_dim(in.weights, 2, "weights");
  check_type(in.weights, wide, "weights");
  check_packed(regions, in.weights.size(0), "weights");
  check_size(in.weights, 1, num_rows, "weights");
  if (regions.has_cells) {
    check_type(in.cells, wide, "cells");
    STD_TORCH_CHECK(in.cells.numel() == num_boxes * regions.side * regions.side * num_rows, "cells: expected ",
                    num_boxes * regions.side * regions.side * num_rows, " values, got ", in.cells.numel());
  }
  if (in.grad_maps.has_value()) {
    STD_TORCH_CHECK(in.map_heads > 0 && num_rows % in.map_heads == 0, "map_heads: expected a divisor of ", num_rows,
                    " rows, got ", in.map_heads);
    check_dim(*in.grad_maps, 2, "grad_maps");
    check_type(*in.grad_maps, wide, "grad_maps");
    check_packed(regions, in.grad_maps->size(0), "grad_maps");
    check_size(*in.grad_maps, 1, num_rows / in.map_heads, "grad_maps");
  }
}

std::tuple<Tensor, Tensor> attend_backward(Tensor grad_context, std::optional<Tensor> grad_maps, Tensor rows,
                                           Tensor tokens, Tensor weights, Tensor cells, Tensor spans, Tensor key_box,
                                           std::optional<Tensor> tap_index, std::optional<Tensor> tap_weight,
                                           int64_t map_heads, bool rows_grad, bool tokens_grad) {
  using torch::stable::contiguous;
  check_tokens(tokens);
  check_dim(rows, 3, "rows");
  const Regions regions = plan_regions(spans, tap_index, tap_weight, tokens.size(0));
  check_packed(regions, key_box.numel(), "key_box");
  BackwardInputs in{contiguous(grad_context), contiguous(rows), tokens,   contiguous(weights),
                    contiguous(cells),        grad_maps,        map_heads};
  if (grad_maps.has_value()) in.grad_maps = contiguous(*grad_maps);
  check_backward(regions, in);
  std::optional<Tensor> grad_rows, grad_tokens;
  if (rows_grad) grad_rows = torch::stable::new_empty(rows, rows.sizes());
  if (tokens_grad) grad_tokens = torch::stable::new_empty(tokens, tokens.sizes());
  if (rows_grad || tokens_grad) {
    with_storage(tokens, "tokens", [&](auto* storage) {
      using X = std::remove_pointer_t<decltype(storage)>;
      attend_backward_typed<X>(regions, in, grad_rows, grad_tokens);
    });
  }
  return {rows_grad ? *grad_rows : torch::stable::new_empty(rows, {0}),
          tokens_grad ? *grad_tokens : torch::stable::new_empty(tokens, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vreflection, CPU, m) { m.impl("attend_backward", TORCH_BOX(&attend_backward)); }

}  // namespace vreflection
