// The two products that region attention is made of, over all boxes of a call.
#pragma once

#include <algorithm>

#include "regions.h"

namespace vreflection {

// Query rows of a call. `box_rows` is 0 when all boxes share their rows.
template <class X>
struct RowSource {
  const X* data;
  int64_t box_rows;  // elements from one box's rows to the next one's
};

constexpr int64_t kDotTokens = 96;     // tokens per task of `dot_regions`: reuses a widened block of rows 96 times
constexpr int64_t kMixColumns = 384;   // channels per task of `mix_regions`: eight register tiles
constexpr int64_t kGradTokens = 128;   // tokens per task of `token_gradient`
constexpr int64_t kGradColumns = 480;  // channels per task of `token_gradient`

// out[key * ld + r] = token of key . row r of the key's box; ld = round_up(R, kRowPad).
template <class X>
void dot_regions(const Regions& regions, const X* tokens, const std::vector<int64_t>& offset, RowSource<X> rows,
                 int64_t num_rows, int64_t width, Wide<X>* out, int64_t ld) {
  struct Task {
    int64_t box, begin, count;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < regions.num_boxes(); ++b) {
    const Region& box = regions.boxes[b];
    for (int64_t key = 0; key < box.keys; key += kDotTokens)
      tasks.push_back({b, box.begin + key, std::min(kDotTokens, box.keys - key)});
  }
  const int64_t num_tasks = int64_t(tasks.size()), workers = worker_count(num_tasks);
  const Workspace<Wide<X>> scratch(sizeof(X) == sizeof(Wide<X>) ? 0 : workers * num_rows * kDotBlock);
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t i) {
    const Task& task = tasks[i];
    kernels<X>().dot_rows(tokens, offset.data() + task.begin, task.count, rows.data + task.box * rows.box_rows, width,
                          num_rows, width, out + task.begin * ld, ld, scratch.data() + worker * num_rows * kDotBlock);
  });
}

// out (B, R, D) = per box the sum over its keys of weight[key, r] * token; with `sum_boxes`, out (1, R, D) is the sum
// over boxes, in box order.
template <class X>
void mix_regions(const Regions& regions, const Wide<X>* weights, int64_t ld, const X* tokens,
                 const std::vector<int64_t>& offset, int64_t num_rows, int64_t width, bool sum_boxes, X* out) {
  using W = Wide<X>;
  const int64_t chunks = divide_up(width, kMixColumns), outputs = sum_boxes ? 1 : regions.num_boxes();
  const int64_t num_tasks = chunks * outputs, workers = worker_count(num_tasks), size = num_rows * kMixColumns;
  const Workspace<W> scratch(workers * size);
  std::vector<int64_t> out_row(num_rows), block_row(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    out_row[r] = r * width;
    block_row[r] = r * kMixColumns;
  }
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t task) {
    const int64_t box = task / chunks, column = task % chunks * kMixColumns;
    const int64_t columns = std::min(kMixColumns, width - column);
    // Keys of all boxes lie in box order, so the sum over boxes is one longer sum.
    const int64_t begin = sum_boxes ? 0 : regions.boxes[box].begin;
    const int64_t count = sum_boxes ? regions.num_keys() : regions.boxes[box].keys;
    const W* from = weights + begin * ld;
    X* to = out + box * num_rows * width + column;
    if constexpr (sizeof(X) == sizeof(W)) {
      if (count > 0 && columns % kTileColumns == 0) {
        kernels<X>().mix_rows(from, ld, num_rows, tokens + column, offset.data() + begin, count, columns, false, to,
                              out_row.data());
        return;
      }
    }
    W* block = scratch.data() + worker * size;
    std::fill(block, block + size, W(0));
    kernels<X>().mix_rows(from, ld, num_rows, tokens + column, offset.data() + begin, count, columns, true, block,
                          block_row.data());
    for (int64_t r = 0; r < num_rows; ++r) kernels<X>().narrow(block + r * kMixColumns, to + r * width, columns);
  });
}

// The separable map of box b: cells (C, count) from the values of its keys (keys, ld). `between` holds
// P * used_columns * count values.
template <class X>
void sample_cells(const Regions& regions, int64_t b, const Wide<X>* values, int64_t ld, int64_t count, Wide<X>* between,
                  Wide<X>* cells) {
  using W = Wide<X>;
  const Region& box = regions.boxes[b];
  const int64_t side = regions.side, columns = box.used_columns;
  std::fill(between, between + side * columns * count, W(0));
  std::fill(cells, cells + side * side * count, W(0));
  for (int64_t py = 0; py < side; ++py) {
    W* row = between + py * columns * count;
    for (const Tap* y = regions.taps_from(b, 0, py); y != regions.taps_to(b, 0, py); ++y)
      for (int64_t x = 0; x < columns; ++x)
        kernels<X>().add_scaled(row + x * count, values + (y->index * columns + x) * ld, W(y->weight), count);
    for (int64_t px = 0; px < side; ++px)
      for (const Tap* x = regions.taps_from(b, 1, px); x != regions.taps_to(b, 1, px); ++x)
        kernels<X>().add_scaled(cells + (py * side + px) * count, row + x->index * count, W(x->weight), count);
  }
}

// Its transpose: overwrites the values of the box's keys.
template <class X>
void splat_cells(const Regions& regions, int64_t b, const Wide<X>* cells, int64_t count, Wide<X>* between,
                 Wide<X>* values, int64_t ld) {
  using W = Wide<X>;
  const Region& box = regions.boxes[b];
  const int64_t side = regions.side, columns = box.used_columns;
  std::fill(between, between + side * columns * count, W(0));
  for (int64_t key = 0; key < box.keys; ++key) std::fill(values + key * ld, values + key * ld + count, W(0));
  for (int64_t py = 0; py < side; ++py) {
    W* row = between + py * columns * count;
    for (int64_t px = 0; px < side; ++px)
      for (const Tap* x = regions.taps_from(b, 1, px); x != regions.taps_to(b, 1, px); ++x)
        kernels<X>().add_scaled(row + x->index * count, cells + (py * side + px) * count, W(x->weight), count);
    for (const Tap* y = regions.taps_from(b, 0, py); y != regions.taps_to(b, 0, py); ++y)
      for (int64_t x = 0; x < columns; ++x)
        kernels<X>().add_scaled(values + (y->index * columns + x) * ld, row + x * count, W(y->weight), count);
  }
}

// Values that `between` needs for the largest box.
inline int64_t between_size(const Regions& regions, int64_t count) {
  int64_t columns = 0;
  for (const Region& box : regions.boxes) columns = std::max(columns, box.used_columns);
  return regions.side * columns * count;
}

}  // namespace vreflection
