// The per-row state machine of a decode step, in place: what vreflection/decoding/state.py and program.py define in
// some forty small tensor operations, in two calls. The token is picked between them.
// Suffixes: B rows, D width, V vocabulary, E end-of-sequence ids per row, R lines of what was emitted.
#include <cstring>

#include "regions.h"

namespace vreflection {
namespace {

constexpr int64_t kLatentBit = 32, kLastBit = 33, kNothing = -1;

template <class T>
T* row_numbers(const Tensor& tensor, ScalarType type, int64_t rows, const char* name) {
  check_type(tensor, type, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows && tensor.is_contiguous(), name, ": expected ", rows,
                  " contiguous values");
  return mutable_data_of<T>(tensor);
}
int64_t* longs(const Tensor& tensor, int64_t rows, const char* name) {
  return row_numbers<int64_t>(tensor, ScalarType::Long, rows, name);
}
bool* flags(const Tensor& tensor, int64_t rows, const char* name) {
  return row_numbers<bool>(tensor, ScalarType::Bool, rows, name);
}

// `plan_transition`; counts the input that the step consumed into `position` and `length`.
void decode_plan(Tensor last_token, Tensor mode, Tensor remaining, Tensor finished, Tensor latent_steps,
                 int64_t lvr_start_id, bool clean, Tensor position, Tensor length, Tensor next_mode,
                 Tensor next_remaining, Tensor needed) {
  const int64_t rows = mode.numel();
  const int64_t *last = longs(last_token, rows, "last_token"), *left = longs(remaining, rows, "remaining");
  const int64_t* steps = longs(latent_steps, rows, "latent_steps");
  const bool *latent = flags(mode, rows, "mode"), *done = flags(finished, rows, "finished");
  int64_t *to_left = longs(next_remaining, rows, "next_remaining"), *place = longs(position, rows, "position");
  int64_t* keys = longs(length, rows, "length");
  bool *to_latent = flags(next_mode, rows, "next_mode"), *wanted = flags(needed, rows, "needed");
  for (int64_t b = 0; b < rows; ++b) {
    const bool entering = last[b] == lvr_start_id, live = !done[b];
    to_left[b] = (entering && !latent[b] ? steps[b] : left[b]) - int64_t(latent[b]);
    to_latent[b] = (latent[b] || entering) && to_left[b] > 0 && live;
    wanted[b] = live && !(clean && to_latent[b]);
    place[b] += live;
    keys[b] += live;
  }
}

// Rows of one matrix over those of another.
void copy_rows(Tensor to, const Tensor& from) {
  if (to.scalar_type() == from.scalar_type() && to.is_contiguous() && from.is_contiguous()) {
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), size_t(from.numel()) * from.element_size());
  } else {
    torch::stable::copy_(to, from);
  }
}

// `advance`, and everything that `DecodeProgram.once` does with its result.
void decode_advance(Tensor hidden, Tensor picked, Tensor next_mode, Tensor next_remaining, Tensor max_new_tokens,
                    Tensor capacity, Tensor end_ids, Tensor length, int64_t lvr_id, int64_t pad_id, bool clean,
                    Tensor mode, Tensor remaining, Tensor finished, Tensor last_token, Tensor z, Tensor counted,
                    std::optional<Tensor> seen, Tensor emitted, std::optional<Tensor> recorded, Tensor cursor,
                    Tensor budget, Tensor running) {
  const int64_t rows = mode.numel();
  const int64_t *token = longs(picked, rows, "picked"), *limit = longs(max_new_tokens, rows, "max_new_tokens");
  const int64_t *room = longs(capacity, rows, "capacity"), *keys = longs(length, rows, "length");
  const int64_t* left = longs(next_remaining, rows, "next_remaining");
  bool *planned = flags(next_mode, rows, "next_mode"), *latent = flags(mode, rows, "mode");
  bool* done = flags(finished, rows, "finished");
  int64_t *to_left = longs(remaining, rows, "remaining"), *last = longs(last_token, rows, "last_token");
  int64_t* count = longs(counted, rows, "counted");
  int64_t *line = longs(cursor, 1, "cursor"), *steps = longs(budget, 1, "budget");
  int32_t* alive = row_numbers<int32_t>(running, ScalarType::Int, 1, "running");
  check_dim(end_ids, 2, "end_ids");
  check_size(end_ids, 0, rows, "end_ids");
  check_type(end_ids, ScalarType::Long, "end_ids");
  STD_TORCH_CHECK(end_ids.is_contiguous(), "end_ids: expected a contiguous tensor, got a strided one");
  check_dim(hidden, 2, "hidden");
  check_dim(z, 2, "z");
  for (int64_t axis = 0; axis < 2; ++axis) check_size(z, axis, hidden.size(axis), "z");
  check_dim(emitted, 2, "emitted");
  check_size(emitted, 1, rows, "emitted");
  check_type(emitted, ScalarType::Long, "emitted");
  STD_TORCH_CHECK(*line >= 0 && *line < emitted.size(0), "cursor: expected a line in [0, ", emitted.size(0), "), got ",
                  *line);
  bool* known = nullptr;
  int64_t vocabulary = 0;
  if (seen.has_value()) {
    check_dim(*seen, 2, "seen");
    check_size(*seen, 0, rows, "seen");
    check_type(*seen, ScalarType::Bool, "seen");
    STD_TORCH_CHECK(seen->is_contiguous(), "seen: expected a contiguous tensor, got a strided one");
    known = mutable_data_of<bool>(*seen);
    vocabulary = seen->size(1);
  }
  const auto id_of = [&](int64_t b) { return done[b] ? pad_id : clean && planned[b] ? lvr_id : token[b]; };
  for (int64_t b = 0; known != nullptr && b < rows; ++b)
    STD_TORCH_CHECK(id_of(b) >= 0 && id_of(b) < vocabulary, "seen: expected ids in [0, ", vocabulary, "), got ",
                    id_of(b));

  const int64_t ends = end_ids.size(1), stride = emitted.stride(1);
  const int64_t* end = data_of<int64_t>(end_ids);
  int64_t* out = mutable_data_of<int64_t>(emitted) + *line * emitted.stride(0);
  bool any = false;
  for (int64_t b = 0; b < rows; ++b) {
    const bool before = done[b], counts = !before && !(clean && planned[b]);
    const int64_t id = id_of(b);
    bool ended = false;
    for (int64_t e = 0; e < ends; ++e) ended |= end[b * ends + e] == id;
    count[b] += counts;
    // End of sequence is a pick like any other inside a span; without room for one more key a row cannot go on.
    done[b] = before || (ended && !planned[b]) || count[b] >= limit[b] || keys[b] >= room[b];
    latent[b] = planned[b] && !done[b];
    if (known != nullptr) known[b * vocabulary + id] |= counts;
    to_left[b] = left[b];
    last[b] = id;
    out[b * stride] = before ? kNothing : id | int64_t(planned[b]) << kLatentBit | int64_t(done[b]) << kLastBit;
    any |= !done[b];
  }
  if (recorded.has_value()) copy_rows(torch::stable::select(*recorded, 0, *line), hidden);
  copy_rows(z, hidden);
  ++*line;
  --*steps;
  *alive = *steps > 0 && any;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vreflection, CPU, m) {
  m.impl("decode_plan", TORCH_BOX(&decode_plan));
  m.impl("decode_advance", TORCH_BOX(&decode_advance));
}

}  // namespace vreflection
