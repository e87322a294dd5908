// Reads and checks the geometry tensors.
#include "regions.h"

namespace vreflection {
namespace {

void check_span(const Region& box, int64_t index, int64_t num_tokens, int64_t packed) {
  STD_TORCH_CHECK(box.height >= 1 && box.width >= 1, "spans: expected height and width >= 1, got ", box.height, " x ",
                  box.width, " for box ", index);
  // Each factor is bounded before the product, which could overflow; rows of one rectangle do not overlap.
  STD_TORCH_CHECK(
      box.first >= 0 && box.first <= num_tokens && box.stride >= 0 && box.stride <= num_tokens &&
          box.height <= num_tokens && box.width <= num_tokens && (box.height == 1 || box.stride >= box.width) &&
          box.first + (box.height - 1) * box.stride + box.width <= num_tokens,
      "spans: expected tokens in [0, ", num_tokens, "), got first ", box.first, ", stride ", box.stride, ", height ",
      box.height, ", width ", box.width, " for box ", index);
  STD_TORCH_CHECK(box.packed_begin == packed, "spans: expected key offset ", packed, " (no gaps, box order), got ",
                  box.packed_begin, " for box ", index);
}

// Taps of one axis of one box, without those of weight 0 (padding), and the rows or columns that they use.
std::vector<int64_t> read_axis(const int64_t* index, const double* weight, int64_t side, int64_t num_taps, int64_t size,
                               Regions& plan) {
  std::vector<int64_t> place(size, -1), used;
  for (int64_t i = 0; i < side * num_taps; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < size, "tap_index: expected values in [0, ", size, "), got ", index[i]);
    if (weight[i] != 0) place[index[i]] = 0;
  }
  for (int64_t i = 0; i < size; ++i) {
    if (place[i] < 0) continue;
    place[i] = int64_t(used.size());
    used.push_back(i);
  }
  for (int64_t cell = 0; cell < side; ++cell) {
    for (int64_t i = cell * num_taps; i < (cell + 1) * num_taps; ++i)
      if (weight[i] != 0) plan.taps.push_back({place[index[i]], weight[i]});
    plan.tap_begin.push_back(int64_t(plan.taps.size()));
  }
  return used;
}

std::vector<int64_t> all_of(int64_t size) {
  std::vector<int64_t> used(size);
  for (int64_t i = 0; i < size; ++i) used[i] = i;
  return used;
}

std::vector<double> weights_of(const Tensor& tensor) {
  const int64_t count = tensor.numel();
  std::vector<double> values(count);
  const bool is_double = tensor.scalar_type() == ScalarType::Double;
  if (!is_double) check_type(tensor, ScalarType::Float, "tap_weight");
  for (int64_t i = 0; i < count; ++i)
    values[i] = is_double ? data_of<double>(tensor)[i] : double(data_of<float>(tensor)[i]);
  return values;
}

}  // namespace

std::vector<int64_t> Regions::offsets(int64_t stride) const {
  std::vector<int64_t> offset(token.size());
  for (size_t i = 0; i < token.size(); ++i) offset[i] = token[i] * stride;
  return offset;
}

Regions plan_regions(const Tensor& spans_any, const std::optional<Tensor>& tap_index,
                     const std::optional<Tensor>& tap_weight, int64_t num_tokens) {
  check_dim(spans_any, 2, "spans");
  check_size(spans_any, 1, 5, "spans");
  check_type(spans_any, ScalarType::Long, "spans");
  STD_TORCH_CHECK(tap_index.has_value() == tap_weight.has_value(),
                  "tap_index and tap_weight: expected both or neither");
  const Tensor spans = torch::stable::contiguous(spans_any);
  const int64_t num_boxes = spans.size(0);
  const int64_t* span = data_of<int64_t>(spans);

  Regions plan;
  plan.has_cells = tap_index.has_value();
  std::optional<Tensor> index;
  std::vector<double> weight;
  int64_t num_taps = 0;
  if (plan.has_cells) {
    check_dim(*tap_index, 4, "tap_index");
    check_dim(*tap_weight, 4, "tap_weight");
    check_type(*tap_index, ScalarType::Long, "tap_index");
    check_size(*tap_index, 0, 2, "tap_index");
    check_size(*tap_index, 1, num_boxes, "tap_index");
    for (int64_t axis = 0; axis < 4; ++axis) check_size(*tap_weight, axis, tap_index->size(axis), "tap_weight");
    index = torch::stable::contiguous(*tap_index);
    weight = weights_of(torch::stable::contiguous(*tap_weight));
    plan.side = tap_index->size(2);
    num_taps = tap_index->size(3);
    STD_TORCH_CHECK(plan.side >= 1 && num_taps >= 1, "tap_index: expected at least one cell and one tap, got ",
                    plan.side, " cells per side and ", num_taps, " taps");
    plan.tap_begin.push_back(0);
  }
  const int64_t axis_size = plan.side * num_taps;
  for (int64_t b = 0; b < num_boxes; ++b, span += 5) {
    Region box{span[0], span[1], span[2], span[3], span[4], plan.num_keys(), 0, 0, 0};
    check_span(box, b, num_tokens, plan.num_packed);
    std::vector<int64_t> rows, columns;
    if (plan.has_cells) {
      const int64_t y = b * axis_size, x = (num_boxes + b) * axis_size;
      const int64_t* taps = data_of<int64_t>(*index);
      rows = read_axis(taps + y, weight.data() + y, plan.side, num_taps, box.height, plan);
      columns = read_axis(taps + x, weight.data() + x, plan.side, num_taps, box.width, plan);
    } else {
      rows = all_of(box.height);
      columns = all_of(box.width);
    }
    for (const int64_t row : rows) {
      for (const int64_t column : columns) {
        plan.token.push_back(box.first + row * box.stride + column);
        plan.packed.push_back(box.packed_begin + row * box.width + column);
      }
    }
    box.used_rows = int64_t(rows.size());
    box.used_columns = int64_t(columns.size());
    box.keys = box.used_rows * box.used_columns;
    plan.num_packed += box.height * box.width;
    plan.boxes.push_back(box);
  }
  return plan;
}

void check_packed(const Regions& regions, int64_t num_packed, const char* what) {
  STD_TORCH_CHECK(num_packed == regions.num_packed, what, ": expected ", regions.num_packed,
                  " packed keys (the boxes' areas), got ", num_packed);
}

}  // namespace vreflection
