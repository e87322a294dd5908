// Products of a few rows with a large matrix, batched over G: bound by reading (or writing) the matrix once.
#include <algorithm>

#include "regions.h"

namespace vreflection {
namespace {

constexpr int64_t kNtRows = 96;      // rows of the matrix per task of `skinny_nt`
constexpr int64_t kNnColumns = 480;  // columns of the matrix per task of `skinny_nn`
constexpr int64_t kTnRows = 32;      // output rows per task of `skinny_tn`

void check_pair(const Tensor& a, const Tensor& b, const char* name_a, const char* name_b) {
  check_dim(a, 3, name_a);
  check_dim(b, 3, name_b);
  check_size(b, 0, a.size(0), name_b);
  check_type(b, a.scalar_type(), name_b);
}

std::vector<int64_t> row_offsets(int64_t count, int64_t stride) {
  std::vector<int64_t> offset(count);
  for (int64_t i = 0; i < count; ++i) offset[i] = i * stride;
  return offset;
}

template <class X>
void skinny_nt_typed(const Tensor& x, const Tensor& w, const Tensor& out) {
  using W = Wide<X>;
  const int64_t groups = x.size(0), rows = x.size(1), depth = x.size(2), columns = w.size(1);
  const int64_t chunks = divide_up(columns, kNtRows), num_tasks = groups * chunks, workers = worker_count(num_tasks);
  const int64_t ld = round_up(rows, kRowPad), size = kNtRows * ld + rows * kDotBlock + kNtRows;
  const Workspace<W> scratch(workers * size);
  const std::vector<int64_t> offset = row_offsets(columns, depth);
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t task) {
    const int64_t g = task / chunks, first = task % chunks * kNtRows, count = std::min(kNtRows, columns - first);
    W* sums = scratch.data() + worker * size;
    W* line = sums + kNtRows * ld;
    kernels<X>().dot_rows(data_of<X>(w) + g * columns * depth, offset.data() + first, count,
                          data_of<X>(x) + g * rows * depth, depth, rows, depth, sums, ld, line + kNtRows);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < count; ++i) line[i] = sums[i * ld + m];
      kernels<X>().narrow(line, mutable_data_of<X>(out) + (g * rows + m) * columns + first, count);
    }
  });
}

template <class X>
void skinny_nn_typed(const Tensor& x, const Tensor& w, const Tensor& out) {
  using W = Wide<X>;
  const int64_t groups = x.size(0), rows = x.size(1), depth = x.size(2), columns = w.size(2);
  const int64_t chunks = divide_up(columns, kNnColumns), num_tasks = groups * chunks, workers = worker_count(num_tasks);
  const int64_t size = rows * kNnColumns;
  const Workspace<W> turned(groups * depth * rows), scratch(workers * size);  // turned: x as (G, K, M), wide
  for (int64_t g = 0; g < groups; ++g) {
    std::vector<W> line(depth);
    for (int64_t m = 0; m < rows; ++m) {
      kernels<X>().widen(data_of<X>(x) + (g * rows + m) * depth, line.data(), depth);
      for (int64_t k = 0; k < depth; ++k) turned.data()[(g * depth + k) * rows + m] = line[k];
    }
  }
  const std::vector<int64_t> offset = row_offsets(depth, columns), out_row = row_offsets(rows, kNnColumns);
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t task) {
    const int64_t g = task / chunks, first = task % chunks * kNnColumns, count = std::min(kNnColumns, columns - first);
    W* sums = scratch.data() + worker * size;
    std::fill_n(sums, size, W(0));
    kernels<X>().mix_rows(turned.data() + g * depth * rows, rows, rows, data_of<X>(w) + g * depth * columns + first,
                          offset.data(), depth, count, true, sums, out_row.data());
    for (int64_t m = 0; m < rows; ++m)
      kernels<X>().narrow(sums + m * kNnColumns, mutable_data_of<X>(out) + (g * rows + m) * columns + first, count);
  });
}

template <class X>
void skinny_tn_typed(const Tensor& out, const Tensor& a, const Tensor& b) {
  using W = Wide<X>;
  const int64_t groups = a.size(0), depth = a.size(1), rows = a.size(2), columns = b.size(2);
  // An odd number of cache lines from row to row spreads the rows over the sets of the first-level cache.
  const int64_t line = 64 / int64_t(sizeof(W));
  int64_t ld = round_up(columns, kTileColumns);
  ld = round_up(ld, line);
  if (ld / line % 2 == 0) ld += line;
  const Workspace<W> right(groups * depth * ld), left(groups * depth * rows);
  kernels<X>().widen(data_of<X>(a), left.data(), groups * depth * rows);
  for (int64_t i = 0; i < groups * depth; ++i) {
    kernels<X>().widen(data_of<X>(b) + i * columns, right.data() + i * ld, columns);
    std::fill(right.data() + i * ld + columns, right.data() + (i + 1) * ld, W(0));
  }
  const int64_t chunks = divide_up(rows, kTnRows), num_tasks = groups * chunks;
  run_tasks(num_tasks, worker_count(num_tasks), [&](int64_t, int64_t task) {
    const int64_t g = task / chunks, first = task % chunks * kTnRows;
    kernels<X>().outer_rows(left.data() + g * depth * rows + first, rows, std::min(kTnRows, rows - first),
                            right.data() + g * depth * ld, ld, depth, columns,
                            mutable_data_of<X>(out) + (g * rows + first) * columns, columns);
  });
}

Tensor skinny_nt(Tensor x, Tensor w) {
  check_pair(x, w, "x", "w");
  check_size(w, 2, x.size(2), "w");
  x = torch::stable::contiguous(x);
  w = torch::stable::contiguous(w);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), w.size(1)});
  with_storage(x, "x", [&](auto* storage) { skinny_nt_typed<std::remove_pointer_t<decltype(storage)>>(x, w, out); });
  return out;
}

Tensor skinny_nn(Tensor x, Tensor w) {
  check_pair(x, w, "x", "w");
  check_size(w, 1, x.size(2), "w");
  x = torch::stable::contiguous(x);
  w = torch::stable::contiguous(w);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), w.size(2)});
  with_storage(x, "x", [&](auto* storage) { skinny_nn_typed<std::remove_pointer_t<decltype(storage)>>(x, w, out); });
  return out;
}

void skinny_tn(Tensor out, Tensor a, Tensor b) {
  check_pair(a, b, "a", "b");
  check_pair(a, out, "a", "out");
  check_size(b, 1, a.size(1), "b");
  check_size(out, 1, a.size(2), "out");
  check_size(out, 2, b.size(2), "out");
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor, got a strided one");
  a = torch::stable::contiguous(a);
  b = torch::stable::contiguous(b);
  with_storage(a, "a", [&](auto* storage) { skinny_tn_typed<std::remove_pointer_t<decltype(storage)>>(out, a, b); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vreflection, CPU, m) {
  m.impl("skinny_nt", TORCH_BOX(&skinny_nt));
  m.impl("skinny_nn", TORCH_BOX(&skinny_nn));
  m.impl("skinny_tn", TORCH_BOX(&skinny_tn));
}

}  // namespace vreflection
