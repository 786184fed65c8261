// Few rows times int8 matrices on a CPU, for XLA's foreign function interface; see few_rows.py.
//
// A decode step reads every weight that it needs once, so nothing but that reading should take time: codes become
// float32 in registers, four neighbouring outputs at a time, while memory is asked for the next four.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Codes = ffi::Buffer<ffi::S8>;
using Integers = ffi::Buffer<ffi::S32>;

constexpr int64_t kLine = 64;          // bytes that memory hands over at once
constexpr int64_t kPiece = 64 * 1024;  // codes of a piece of work for one thread

// y[r] = sum over d of x[d] w[r, d], for four rows of w.
void FourDots(const float* __restrict x, const int8_t* __restrict w, int64_t n, float* __restrict y) {
  float y0 = 0, y1 = 0, y2 = 0, y3 = 0;
  for (int64_t d = 0; d < n; ++d) {
    y0 += x[d] * w[d];
    y1 += x[d] * w[d + n];
    y2 += x[d] * w[d + 2 * n];
    y3 += x[d] * w[d + 3 * n];
  }
  y[0] = y0, y[1] = y1, y[2] = y2, y[3] = y3;
}

float Dot(const float* __restrict x, const int8_t* __restrict w, int64_t n) {
  float y = 0;
  for (int64_t d = 0; d < n; ++d) y += x[d] * w[d];
  return y;
}

// finish(j, w_j . x) for every row j of w in [first, last).
template <typename Finish>
void EachRow(const float* x, const int8_t* w, int64_t n, int64_t first, int64_t last, Finish finish) {
  float y[4];
  int64_t j = first;
  for (; j + 4 <= last; j += 4) {
    const int8_t* next = w + (j + 4) * n;
    for (int64_t d = 0; d < 4 * n; d += kLine) __builtin_prefetch(next + d);
    FourDots(x, w + j * n, n, y);
    for (int r = 0; r < 4; ++r) finish(j + r, y[r]);
  }
  for (; j < last; ++j) finish(j, Dot(x, w + j * n, n));
}

// work(item, first, last) for every item and all its rows, piece by piece, by this thread and idle ones of the pool.
// The caller takes pieces too, so that it never waits for a thread that does not come.
template <typename Work>
void Parallel(ffi::ThreadPool& pool, int64_t items, int64_t rows, int64_t row_size, const Work& work) {
  int64_t height = std::max<int64_t>(4, kPiece / row_size / 4 * 4);
  int64_t pieces = (rows + height - 1) / height, count = items * pieces;
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto run = [=, &work] {  // whoever comes late finds nothing left, and does not touch `work`
    for (int64_t i; (i = progress->next.fetch_add(1)) < count; progress->done.fetch_add(1)) {
      int64_t first = i % pieces * height;
      work(i / pieces, first, std::min(rows, first + height));
    }
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    auto copy = run;
    pool.Schedule(std::move(copy));
  }
  run();
  while (progress->done.load() < count) {
  }
}

// y [R, F] = x [R, D] times w [F, D], scaled by output.
ffi::Error Product(ffi::ThreadPool pool, Floats x, Codes w, Floats scales, ffi::ResultBuffer<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], d = x.dimensions()[1], f = w.dimensions()[0];
  const float *from = x.typed_data(), *scale = scales.typed_data();
  const int8_t* codes = w.typed_data();
  float* to = y->typed_data();
  Parallel(pool, 1, f, d, [=](int64_t, int64_t first, int64_t last) {
    for (int64_t r = 0; r < rows; ++r)
      EachRow(from + r * d, codes, d, first, last, [=](int64_t j, float v) { to[r * f + j] = v * scale[j]; });
  });
  return ffi::Error::Success();
}

// y [A, D]: (silu(x gate) * (x up)) down of each row x [A, D] with the matrices of its expert [A], gate and up
// [E, F, D], down [E, D, F]; zeros for a row without one.
ffi::Error Experts(ffi::ThreadPool pool, Floats x, Integers expert, Codes gate, Floats gate_scales, Codes up,
                   Floats up_scales, Codes down, Floats down_scales, ffi::ResultBuffer<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], d = x.dimensions()[1], f = gate.dimensions()[1];
  std::vector<int64_t> known;  // rows that have an expert
  const int32_t* of_row = expert.typed_data();
  for (int64_t a = 0; a < rows; ++a)
    if (of_row[a] >= 0 && of_row[a] < gate.dimensions()[0]) known.push_back(a);
  std::vector<float> hidden(rows * f);
  std::fill_n(y->typed_data(), rows * d, 0.0f);

  Parallel(pool, known.size(), f, 2 * d, [&](int64_t item, int64_t first, int64_t last) {
    int64_t a = known[item], e = of_row[a];
    const float* from = x.typed_data() + a * d;
    const float *scale = gate_scales.typed_data() + e * f, *up_scale = up_scales.typed_data() + e * f;
    float* to = hidden.data() + a * f;
    EachRow(from, up.typed_data() + e * f * d, d, first, last, [=](int64_t j, float v) { to[j] = v * up_scale[j]; });
    EachRow(from, gate.typed_data() + e * f * d, d, first, last, [=](int64_t j, float v) {
      v *= scale[j];
      to[j] *= v / (1.0f + std::exp(-v));
    });
  });
  Parallel(pool, known.size(), d, f, [&](int64_t item, int64_t first, int64_t last) {
    int64_t a = known[item], e = of_row[a];
    const float* scale = down_scales.typed_data() + e * d;
    float* to = y->typed_data() + a * d;
    EachRow(hidden.data() + a * f, down.typed_data() + e * d * f, f, first, last,
            [=](int64_t j, float v) { to[j] = v * scale[j]; });
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(switchyard_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Codes>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(switchyard_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Codes>()
                                  .Arg<Floats>()
                                  .Arg<Codes>()
                                  .Arg<Floats>()
                                  .Arg<Codes>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
