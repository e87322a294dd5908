// `attend`: few query rows against the tokens of each box's region. Scores, softmax (over tokens, or over RoI-Align
// cells of the scores) and context; no key or value per token is ever made.
#include "region_products.h"

namespace vreflection {
namespace {

// Softmax of each box's scores, in place; with an RoI-Align map over cells (kept in `cells`), splatted back.
template <class X>
void softmax_regions(const Regions& regions, Wide<X>* scores, int64_t ld, int64_t num_rows, Wide<X>* cells) {
  using W = Wide<X>;
  if (!regions.has_cells) {
    constexpr int64_t kColumns = 64 / sizeof(W);  // a cache line of each key
    const int64_t blocks = divide_up(num_rows, kColumns), num_tasks = regions.num_boxes() * blocks;
    run_tasks(num_tasks, worker_count(num_tasks), [&](int64_t, int64_t task) {
      const Region& box = regions.boxes[task / blocks];
      const int64_t column = task % blocks * kColumns;
      kernels<X>().softmax_columns(scores + box.begin * ld + column, ld, box.keys,
                                   std::min(kColumns, num_rows - column));
    });
    return;
  }
  const int64_t num_tasks = regions.num_boxes(), workers = worker_count(num_tasks);
  const int64_t num_cells = regions.side * regions.side, size = between_size(regions, num_rows);
  const Workspace<W> between(workers * size);
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t b) {
    W* values = scores + regions.boxes[b].begin * ld;
    W* box_cells = cells + b * num_cells * num_rows;
    W* mine = between.data() + worker * size;
    sample_cells<X>(regions, b, values, ld, num_rows, mine, box_cells);
    kernels<X>().softmax_columns(box_cells, num_rows, num_cells, num_rows);
    splat_cells<X>(regions, b, box_cells, num_rows, mine, values, ld);
  });
}

// Packed weights (S, R) and their mean over heads (S, Q). Keys without a tap have weight 0.
template <class W>
void write_weights(const Regions& regions, const W* scores, int64_t ld, int64_t num_rows, int64_t heads, W* weights,
                   W* maps) {
  const int64_t queries = heads > 0 ? num_rows / heads : 0;
  const int64_t num_tasks = regions.num_boxes();
  run_tasks(num_tasks, worker_count(num_tasks), [&](int64_t, int64_t b) {
    const Region& box = regions.boxes[b];
    const int64_t area = box.height * box.width;
    if (box.keys < area) {
      std::fill_n(weights + box.packed_begin * num_rows, area * num_rows, W(0));
      if (queries > 0) std::fill_n(maps + box.packed_begin * queries, area * queries, W(0));
    }
    for (int64_t key = box.begin; key < box.begin + box.keys; ++key) {
      const W* from = scores + key * ld;
      std::copy(from, from + num_rows, weights + regions.packed[key] * num_rows);
      if (queries == 0) continue;
      W* map = maps + regions.packed[key] * queries;
      for (int64_t q = 0; q < queries; ++q) {
        W total = 0;
        for (int64_t h = 0; h < heads; ++h) total += from[h * queries + q];
        map[q] = total / W(heads);
      }
    }
  });
}

template <class X>
void attend_typed(const Regions& regions, const Tensor& rows, const Tensor& tokens, int64_t heads,
                  const Tensor& context, const Tensor& weights, const Tensor& cells, const Tensor& maps) {
  using W = Wide<X>;
  const int64_t num_rows = rows.size(1), width = rows.size(2), ld = round_up(num_rows, kRowPad);
  const std::vector<int64_t> offset = regions.offsets(tokens.stride(0));
  const RowSource<X> source{data_of<X>(rows), rows.size(0) == 1 ? 0 : num_rows * width};
  const Workspace<W> scores(regions.num_keys() * ld);
  dot_regions<X>(regions, data_of<X>(tokens), offset, source, num_rows, width, scores.data(), ld);
  softmax_regions<X>(regions, scores.data(), ld, num_rows, mutable_data_of<W>(cells));
  mix_regions<X>(regions, scores.data(), ld, data_of<X>(tokens), offset, num_rows, width, false,
                 mutable_data_of<X>(context));
  write_weights<W>(regions, scores.data(), ld, num_rows, heads, mutable_data_of<W>(weights), mutable_data_of<W>(maps));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend(Tensor rows, Tensor tokens, Tensor spans, Tensor key_box,
                                                  std::optional<Tensor> tap_index, std::optional<Tensor> tap_weight,
                                                  int64_t map_heads) {
  check_tokens(tokens);
  check_dim(rows, 3, "rows");
  check_size(rows, 2, tokens.size(1), "rows");
  check_type(rows, tokens.scalar_type(), "rows");
  const Regions regions = plan_regions(spans, tap_index, tap_weight, tokens.size(0));
  const int64_t num_boxes = regions.num_boxes(), num_rows = rows.size(1);
  check_packed(regions, key_box.numel(), "key_box");
  STD_TORCH_CHECK(rows.size(0) == 1 || rows.size(0) == num_boxes, "rows: expected 1 or ", num_boxes, " on axis 0, got ",
                  rows.size(0));
  STD_TORCH_CHECK(map_heads >= 0 && (map_heads == 0 || num_rows % map_heads == 0),
                  "map_heads: expected 0 or a divisor of ", num_rows, " rows, got ", map_heads);
  rows = torch::stable::contiguous(rows);

  const ScalarType wide = wide_type(tokens.scalar_type());
  const Tensor context = torch::stable::new_empty(tokens, {num_boxes, num_rows, rows.size(2)});
  const Tensor weights = torch::stable::new_empty(tokens, {regions.num_packed, num_rows}, wide);
  const int64_t num_cells = regions.side * regions.side;
  const Tensor cells = regions.has_cells ? torch::stable::new_empty(tokens, {num_boxes, num_cells, num_rows}, wide)
                                         : torch::stable::new_empty(tokens, {0}, wide);
  const Tensor maps = map_heads > 0 ? torch::stable::new_empty(tokens, {regions.num_packed, num_rows / map_heads}, wide)
                                    : torch::stable::new_empty(tokens, {0}, wide);
  with_storage(tokens, "tokens", [&](auto* storage) {
    using X = std::remove_pointer_t<decltype(storage)>;
    attend_typed<X>(regions, rows, tokens, map_heads, context, weights, cells, maps);
  });
  return {context, weights, cells, maps};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vreflection, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }

}  // namespace vreflection
