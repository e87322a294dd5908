// One decode step of a Qwen2-type decoder: every layer in one call, bound by reading the weights once.
// Suffixes: B rows, D width, H query heads, K key/value heads, E head width, C cache columns, I MLP width.
#include <algorithm>
#include <cmath>
#include <thread>

#include "regions.h"

namespace vreflection {
namespace {

constexpr int64_t kBlock = 64;  // weight rows whose sums are kept before they are rounded
// Weights of one task: at 33 GB/s of one core 4 us of work, against 0.3 us to draw it.
constexpr int64_t kTaskBytes = 128 << 10;
// Bytes of a layer (weights, once per row, and cached keys and values) from which a second thread pays. One row, one
// thread against two: 36 and 48 us with 150 KB a layer, 69 and 79 us with 560 KB, 108 and 93 us with 780 KB.
constexpr int64_t kThreadBytes = 640 << 10;
constexpr int64_t kWeightsPerLayer = 12;

// Threads that go through the same phases together. Tasks of a phase are drawn from a counter, and a phase is over
// when all its tasks are done: nobody ever waits for a thread that has not started, however many there are.
class Phases {
 public:
  explicit Phases(int64_t count) : counters_(count) {}

  template <class F>
  void run(int64_t phase, int64_t num_tasks, const F& task) {
    Counter& counter = counters_[phase];
    if (counter.done.load(std::memory_order_acquire) == num_tasks) return;
    int64_t finished = 0;
    for (int64_t i = counter.next++; i < num_tasks; i = counter.next++, ++finished) task(i);
    if (finished > 0) counter.done.fetch_add(finished, std::memory_order_acq_rel);
    for (int64_t i = 0; counter.done.load(std::memory_order_acquire) != num_tasks; ++i) wait(i);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0}, done{0};
  };
  static void wait(int64_t turn) {
    if (turn >= 4000) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::vector<Counter> counters_;
};

template <class X>
struct Layer {
  const X *norm1, *wq, *bq, *wk, *bk, *wv, *bv, *wo, *norm2, *gate, *up, *down;
  X *keys, *values;
  double eps;
};

struct Shape {
  int64_t rows, width, heads, groups, head, columns, extent, inner;  // B, D, H, K, E, C, columns to look at, I
  int64_t queries() const { return heads * head; }
  int64_t keys() const { return groups * head; }
  int64_t projected() const { return queries() + 2 * keys(); }
  int64_t shared() const { return heads / groups; }  // query heads per key head
};

template <class X>
struct Step {
  using W = Wide<X>;
  Shape s;
  std::vector<Layer<X>> layers;
  const int64_t* length;
  const X *cos, *sin;  // (B, E), the sine with the sign of the half rotation
  X *x, *qkv, *mixed, *hidden;
  int64_t visible_pad;  // the longest row's keys, padded for `softmax_rows`
  const Kernels<X>& k = kernels<X>();

  // Scratch of one thread.
  struct Scratch {
    X *norm, *heads, *line;
    W *sums, *scores, *wide;
  };

  int64_t tasks(int64_t weight_rows, int64_t depth) const {
    const int64_t bytes = weight_rows * depth * int64_t(sizeof(X));
    return std::max<int64_t>(1, std::min(divide_up(weight_rows, 8), divide_up(bytes, kTaskBytes)));
  }
  // Weight rows of a task, in whole tiles of 8.
  static std::pair<int64_t, int64_t> share(int64_t task, int64_t num_tasks, int64_t weight_rows) {
    const int64_t tiles = divide_up(weight_rows, 8);
    return {tiles * task / num_tasks * 8, std::min(weight_rows, tiles * (task + 1) / num_tasks * 8)};
  }

  // out[b, n] = round(w[n] . in[b] + bias[n]) for n in [begin, end), handed over in blocks: emit(first, count, sums),
  // where row b's sums start at sums + b * kBlock.
  template <class F>
  void linear(const X* w, const X* bias, const X* in, int64_t depth, int64_t begin, int64_t end, W* sums,
              const F& emit) const {
    for (int64_t n = begin; n < end; n += kBlock) {
      const int64_t count = std::min(kBlock, end - n);
      k.linear_rows(w + n * depth, count, depth, in, depth, s.rows, sums, kBlock);
      if (bias != nullptr)
        for (int64_t b = 0; b < s.rows; ++b) k.add_scaled_tokens(sums + b * kBlock, bias + n, W(1), count);
      emit(n, count);
    }
  }

  void project(const Layer<X>& layer, int64_t begin, int64_t end, const Scratch& mine) const {
    const X* const weights[] = {layer.wq, layer.wk, layer.wv};
    const X* const biases[] = {layer.bq, layer.bk, layer.bv};
    const int64_t sizes[] = {s.queries(), s.keys(), s.keys()};
    for (int64_t part = 0, start = 0; part < 3; start += sizes[part++]) {
      const int64_t from = std::max<int64_t>(begin - start, 0), to = std::min(end - start, sizes[part]);
      linear(weights[part], biases[part], mine.norm, s.width, from, to, mine.sums, [&](int64_t n, int64_t count) {
        for (int64_t b = 0; b < s.rows; ++b)
          k.narrow(mine.sums + b * kBlock, qkv + b * s.projected() + start + n, count);
      });
    }
  }

  // Rotated by the row's angle, rounded as often as in plain PyTorch.
  void rotate(const X* in, const X* row_cos, const X* row_sin, const Scratch& mine, X* out) const {
    const int64_t half = s.head / 2;
    W *value = mine.wide, *c = value + s.head, *si = c + s.head;
    k.widen(in, value, s.head);
    k.widen(row_cos, c, s.head);
    k.widen(row_sin, si, s.head);
    for (int64_t i = 0; i < s.head; ++i) c[i] *= value[i];
    k.narrow(c, out, s.head);
    k.widen(out, c, s.head);
    for (int64_t i = 0; i < half; ++i) c[i] += value[i + half] * si[i];
    for (int64_t i = half; i < s.head; ++i) c[i] += value[i - half] * si[i];
    k.narrow(c, out, s.head);
  }

  // One head group of one row: its new key and value into the cache, then attention over all its keys.
  void attend(const Layer<X>& layer, int64_t b, int64_t group, const Scratch& mine) const {
    const X *row = qkv + b * s.projected(), *row_cos = cos + b * s.head, *row_sin = sin + b * s.head;
    const int64_t line = (b * s.groups + group) * s.columns, column = std::min(length[b], s.columns - 1);
    const int64_t visible = std::min(length[b] + 1, s.extent), shared = s.shared();
    X *keys = layer.keys + line * s.head, *values = layer.values + line * s.head;
    rotate(row + s.queries() + group * s.head, row_cos, row_sin, mine, keys + column * s.head);
    std::copy_n(row + s.queries() + s.keys() + group * s.head, s.head, values + column * s.head);
    for (int64_t h = 0; h < shared; ++h)
      rotate(row + (group * shared + h) * s.head, row_cos, row_sin, mine, mine.heads + h * s.head);
    k.linear_rows(keys, visible, s.head, mine.heads, s.head, shared, mine.scores, visible_pad);
    k.softmax_rows(mine.scores, visible_pad, shared, visible, W(1 / std::sqrt(double(s.head))));
    k.mix_values(mine.scores, visible_pad, shared, values, visible, s.head, mine.wide);
    k.narrow(mine.wide, mixed + b * s.queries() + group * shared * s.head, shared * s.head);
  }

  // x += round(w . in), for some columns of x.
  void add_linear(const X* w, const X* in, int64_t depth, int64_t begin, int64_t end, const Scratch& mine) const {
    linear(w, nullptr, in, depth, begin, end, mine.sums, [&](int64_t n, int64_t count) {
      for (int64_t b = 0; b < s.rows; ++b) {
        k.narrow(mine.sums + b * kBlock, mine.line, count);
        k.add_row(x + b * s.width + n, mine.line, count);
      }
    });
  }

  void gate(const Layer<X>& layer, int64_t begin, int64_t end, const Scratch& mine) const {
    W* other = mine.sums + s.rows * kBlock;
    for (int64_t n = begin; n < end; n += kBlock) {
      const int64_t count = std::min(kBlock, end - n);
      k.linear_rows(layer.gate + n * s.width, count, s.width, mine.norm, s.width, s.rows, mine.sums, kBlock);
      k.linear_rows(layer.up + n * s.width, count, s.width, mine.norm, s.width, s.rows, other, kBlock);
      for (int64_t b = 0; b < s.rows; ++b) {
        k.narrow(mine.sums + b * kBlock, mine.line, count);
        k.narrow(other + b * kBlock, mine.line + kBlock, count);
        k.gate_row(mine.line, mine.line + kBlock, hidden + b * s.inner + n, count);
      }
    }
  }

  void norm(const X* weight, double eps, X* out) const {
    for (int64_t b = 0; b < s.rows; ++b) k.norm_row(x + b * s.width, weight, eps, s.width, out + b * s.width);
  }

  // What one thread does. Each keeps its own copy of the normed rows, made when it draws its first task: that costs
  // less than another phase.
  void take_part(Phases& phases, const Scratch& mine) const {
    int64_t phase = 0;
    const int64_t in_qkv = tasks(s.projected(), s.width), in_out = tasks(s.width, s.queries());
    const int64_t in_gate = tasks(2 * s.inner, s.width), in_down = tasks(s.width, s.inner);
    for (const Layer<X>& layer : layers) {
      bool normed = false;
      phases.run(phase++, in_qkv, [&](int64_t task) {
        if (!normed) norm(layer.norm1, layer.eps, mine.norm);
        normed = true;
        const auto [begin, end] = share(task, in_qkv, s.projected());
        project(layer, begin, end, mine);
      });
      phases.run(phase++, s.rows * s.groups,
                 [&](int64_t task) { attend(layer, task / s.groups, task % s.groups, mine); });
      phases.run(phase++, in_out, [&](int64_t task) {
        const auto [begin, end] = share(task, in_out, s.width);
        add_linear(layer.wo, mixed, s.queries(), begin, end, mine);
      });
      normed = false;
      phases.run(phase++, in_gate, [&](int64_t task) {
        if (!normed) norm(layer.norm2, layer.eps, mine.norm);
        normed = true;
        const auto [begin, end] = share(task, in_gate, s.inner);
        gate(layer, begin, end, mine);
      });
      phases.run(phase++, in_down, [&](int64_t task) {
        const auto [begin, end] = share(task, in_down, s.width);
        add_linear(layer.down, hidden, s.inner, begin, end, mine);
      });
    }
  }
};

// Memory of a call, cut into aligned pieces: measured first, then taken.
struct Pieces {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    char* const from = base + used;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(from);
  }
};

struct Arguments {
  const std::vector<Tensor>&weights, &keys, &values;
  const std::vector<double>& eps;
  Tensor inputs, position, length, inverse_frequency;
  double rope_scale;
};

template <class X>
Tensor run_step(const Arguments& args, const Shape& s) {
  using W = Wide<X>;
  const int64_t num_layers = int64_t(args.keys.size()), *length = data_of<int64_t>(args.length);
  Step<X> step{s, {}, length};
  int64_t longest = 0, work = s.rows * (s.projected() + s.queries() + 3 * s.inner) * s.width;
  for (int64_t b = 0; b < s.rows; ++b) {
    STD_TORCH_CHECK(length[b] >= 0, "length: expected at least 0, got ", length[b]);
    const int64_t visible = std::min(length[b] + 1, s.extent);
    longest = std::max(longest, visible);
    work += 2 * visible * s.keys();
  }
  step.visible_pad = round_up(longest, 16);
  for (int64_t i = 0; i < num_layers; ++i) {
    const Tensor* w = args.weights.data() + i * kWeightsPerLayer;
    const auto at = [&](int64_t j) { return w[j].numel() == 0 ? nullptr : data_of<X>(w[j]); };
    step.layers.push_back({at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11),
                           mutable_data_of<X>(args.keys[i]), mutable_data_of<X>(args.values[i]), args.eps[i]});
  }

  const bool threads_pay = work * int64_t(sizeof(X)) >= kThreadBytes;
  const int64_t workers = threads_pay ? worker_count(s.rows * s.groups + divide_up(s.inner, 8)) : 1;
  std::vector<typename Step<X>::Scratch> scratch(workers);
  X *cos = nullptr, *sin = nullptr;
  const auto lay_out = [&](Pieces pieces) {
    step.x = pieces.take<X>(s.rows * s.width);
    step.qkv = pieces.take<X>(s.rows * s.projected());
    step.mixed = pieces.take<X>(s.rows * s.queries());
    step.hidden = pieces.take<X>(s.rows * s.inner);
    step.cos = cos = pieces.take<X>(s.rows * s.head);
    step.sin = sin = pieces.take<X>(s.rows * s.head);
    for (auto& mine : scratch) {
      mine.norm = pieces.take<X>(s.rows * s.width);
      mine.heads = pieces.take<X>(s.shared() * s.head);
      mine.line = pieces.take<X>(2 * kBlock);
      mine.sums = pieces.take<W>(2 * s.rows * kBlock);
      mine.scores = pieces.take<W>(s.shared() * step.visible_pad);
      mine.wide = pieces.take<W>(std::max<int64_t>(3, s.shared()) * s.head);
    }
    return pieces.used;
  };
  const Workspace<char> memory(lay_out(Pieces{}));
  lay_out(Pieces{memory.data()});

  // Angles are float32 numbers whatever the model's type, as in the host library.
  const float* frequency = data_of<float>(args.inverse_frequency);
  const int64_t *position = data_of<int64_t>(args.position), half = s.head / 2;
  for (int64_t b = 0; b < s.rows; ++b) {
    std::vector<W> line(2 * s.head);
    for (int64_t i = 0; i < half; ++i) {
      const W angle = W(float(position[b]) * frequency[i]);
      const float c = float(std::cos(angle)) * float(args.rope_scale);
      const float si = float(std::sin(angle)) * float(args.rope_scale);
      line[i] = line[i + half] = c;
      line[s.head + i] = -si;
      line[s.head + i + half] = si;
    }
    step.k.narrow(line.data(), cos + b * s.head, s.head);
    step.k.narrow(line.data() + s.head, sin + b * s.head, s.head);
  }
  std::copy_n(data_of<X>(args.inputs), s.rows * s.width, step.x);

  Phases phases(5 * num_layers);
  if (workers == 1) {
    step.take_part(phases, scratch[0]);
  } else {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) { step.take_part(phases, scratch[begin]); });
  }
  const Tensor out = torch::stable::new_empty(args.inputs, {s.rows, s.width});
  step.norm(data_of<X>(args.weights.back()), args.eps.back(), mutable_data_of<X>(out));
  return out;
}

void check_dense(const Tensor& tensor, ScalarType type, const char* name) {
  check_type(tensor, type, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got a strided one");
}
void check_numbers(const Tensor& tensor, ScalarType type, int64_t count, const char* name) {
  check_dim(tensor, 1, name);
  check_size(tensor, 0, count, name);
  check_dense(tensor, type, name);
}
void check_matrix(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns, const char* name) {
  check_dim(tensor, 2, name);
  check_size(tensor, 0, rows, name);
  check_size(tensor, 1, columns, name);
  check_dense(tensor, type, name);
}

void check_layer(const Tensor* w, const Shape& s, ScalarType type) {
  const auto check_bias = [&](const Tensor& bias, int64_t count, const char* name) {
    if (bias.numel() != 0) check_numbers(bias, type, count, name);
  };
  check_numbers(w[0], type, s.width, "norm1");
  check_matrix(w[1], type, s.queries(), s.width, "wq");
  check_bias(w[2], s.queries(), "bq");
  check_matrix(w[3], type, s.keys(), s.width, "wk");
  check_bias(w[4], s.keys(), "bk");
  check_matrix(w[5], type, s.keys(), s.width, "wv");
  check_bias(w[6], s.keys(), "bv");
  check_matrix(w[7], type, s.width, s.queries(), "wo");
  check_numbers(w[8], type, s.width, "norm2");
  check_matrix(w[9], type, s.inner, s.width, "gate");
  check_matrix(w[10], type, s.inner, s.width, "up");
  check_matrix(w[11], type, s.width, s.inner, "down");
}

// `weights`: per layer norm1, wq, bq, wk, bk, wv, bv, wo, norm2, gate, up, down, an absent bias being empty; then the
// final norm. `eps`: per layer, then the final one.
Tensor decode_step(Tensor inputs, Tensor position, Tensor length, int64_t extent, std::vector<Tensor> weights,
                   std::vector<double> eps, Tensor inverse_frequency, double rope_scale, std::vector<Tensor> keys,
                   std::vector<Tensor> values) {
  const int64_t num_layers = int64_t(keys.size());
  STD_TORCH_CHECK(num_layers > 0 && int64_t(values.size()) == num_layers && int64_t(eps.size()) == num_layers + 1 &&
                      int64_t(weights.size()) == num_layers * kWeightsPerLayer + 1,
                  "decode_step: expected ", kWeightsPerLayer, " weights, keys, values and an eps per layer, got ",
                  weights.size(), ", ", keys.size(), ", ", values.size(), " and ", eps.size());
  check_dim(inputs, 2, "inputs");
  check_dim(keys[0], 4, "keys");
  check_dim(weights[1], 2, "wq");
  check_dim(weights[9], 2, "gate");
  Shape s;
  s.rows = inputs.size(0);
  s.width = inputs.size(1);
  s.groups = keys[0].size(1);
  s.columns = keys[0].size(2);
  s.head = keys[0].size(3);
  s.extent = std::min(extent, s.columns);
  s.heads = s.head == 0 ? 0 : weights[1].size(0) / s.head;
  s.inner = weights[9].size(0);
  STD_TORCH_CHECK(s.head > 0 && s.head % 2 == 0 && s.groups > 0 && s.heads > 0 && s.heads % s.groups == 0,
                  "decode_step: expected an even head width and whole groups of heads, got ", weights[1].size(0),
                  " query channels and ", s.groups, " key heads of width ", s.head);
  STD_TORCH_CHECK(s.extent > 0, "extent: expected at least 1 column, got ", s.extent);
  const ScalarType type = inputs.scalar_type();
  const int64_t held = keys[0].size(0);
  STD_TORCH_CHECK(s.rows <= held, "inputs: expected at most the cache's ", held, " rows, got ", s.rows);
  for (int64_t i = 0; i < num_layers; ++i) {
    check_layer(weights.data() + i * kWeightsPerLayer, s, type);
    for (const Tensor& cached : {keys[i], values[i]}) {
      check_dim(cached, 4, "cache");
      const int64_t sizes[] = {held, s.groups, s.columns, s.head};
      for (int64_t axis = 0; axis < 4; ++axis) check_size(cached, axis, sizes[axis], "cache");
      check_dense(cached, type, "cache");
    }
  }
  check_numbers(weights.back(), type, s.width, "final norm");
  check_numbers(position, ScalarType::Long, s.rows, "position");
  check_numbers(length, ScalarType::Long, s.rows, "length");
  check_numbers(inverse_frequency, ScalarType::Float, s.head / 2, "inverse_frequency");
  const Arguments args{weights, keys, values, eps, torch::stable::contiguous(inputs), position,
                       length,  inverse_frequency, rope_scale};
  if (s.rows == 0) return torch::stable::new_empty(inputs, {0, s.width});
  return with_storage(inputs, "inputs",
                      [&](auto* storage) { return run_step<std::remove_pointer_t<decltype(storage)>>(args, s); });
}

// The best logit of a row among some words: the first of equals, and a NaN before any number, as in PyTorch.
template <class W>
struct Best {
  W value = 0;
  int64_t word = -1;
  void take(W other, int64_t at) {
    if (word >= 0 && !(other > value) && !(other != other && value == value)) return;
    value = other;
    word = at;
  }
};

template <class X>
void pick_words(const Tensor& hidden, const bool* needed, const Tensor& weight, int64_t* picked) {
  using W = Wide<X>;
  const int64_t width = hidden.size(1), words = weight.size(0);
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < hidden.size(0); ++b) {
    picked[b] = 0;
    if (needed[b]) rows.push_back(b);
  }
  const int64_t count = int64_t(rows.size()), bytes = words * width * int64_t(sizeof(X));
  if (count == 0) return;
  const int64_t num_tasks = std::min(divide_up(words, kBlock), divide_up(bytes, kTaskBytes));
  const int64_t workers = worker_count(num_tasks), tiles = divide_up(words, kBlock);
  const Workspace<X> packed(count * width), lines(workers * kBlock);
  const Workspace<W> scratch(workers * count * kBlock);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(data_of<X>(hidden) + rows[i] * width, width, packed.data() + i * width);
  std::vector<Best<W>> best(num_tasks * count);
  run_tasks(num_tasks, workers, [&](int64_t worker, int64_t task) {
    W* sums = scratch.data() + worker * count * kBlock;
    X* line = lines.data() + worker * kBlock;
    for (int64_t n = tiles * task / num_tasks * kBlock, end = std::min(words, tiles * (task + 1) / num_tasks * kBlock);
         n < end; n += kBlock) {
      const int64_t part = std::min(kBlock, end - n);
      kernels<X>().linear_rows(data_of<X>(weight) + n * width, part, width, packed.data(), width, count, sums, kBlock);
      for (int64_t i = 0; i < count; ++i) {
        W* logits = sums + i * kBlock;  // rounded, since equal logits go to the first word
        kernels<X>().narrow(logits, line, part);
        kernels<X>().widen(line, logits, part);
        for (int64_t j = 0; j < part; ++j) best[task * count + i].take(logits[j], n + j);
      }
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    Best<W> winner;
    for (int64_t task = 0; task < num_tasks; ++task)
      winner.take(best[task * count + i].value, best[task * count + i].word);
    picked[rows[i]] = winner.word;
  }
}

// arg-max of weight . hidden for each row that needs it, 0 for the others.
Tensor decode_pick(Tensor hidden, Tensor needed, Tensor weight) {
  check_dim(hidden, 2, "hidden");
  check_dim(weight, 2, "weight");
  check_matrix(weight, hidden.scalar_type(), weight.size(0), hidden.size(1), "weight");
  check_numbers(needed, ScalarType::Bool, hidden.size(0), "needed");
  STD_TORCH_CHECK(weight.size(0) > 0, "weight: expected at least one word, got none");
  hidden = torch::stable::contiguous(hidden);
  const Tensor picked = torch::stable::new_empty(hidden, {hidden.size(0)}, ScalarType::Long);
  with_storage(hidden, "hidden", [&](auto* storage) {
    pick_words<std::remove_pointer_t<decltype(storage)>>(hidden, data_of<bool>(needed), weight,
                                                         mutable_data_of<int64_t>(picked));
  });
  return picked;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vreflection, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("decode_pick", TORCH_BOX(&decode_pick));
}

}  // namespace vreflection
