// Bias + activation, plain and gated, forward and backward (the maths is in mod.rs).
//
// h, dh [T, N] or, gated, [T, 2N] = input beside gate; y, dy [T, N]; bias f32, of h's width, may be
// null. Backward leaves column sums of dh, in f32 before it is rounded, as [parts, width of h].
#include "../common/device.cuh"

namespace {
// In the order of `Activation`.
enum class Function : int { Gelu, GeluTanh, Relu, Silu, Tanh };

struct Forward {
  const void* h;
  const float* bias;
  void* y;
  int rows, columns;  // of y
  Function function;
};
struct Backward {
  const void *dy, *h;
  const float* bias;
  void* dh;
  float* partials;    // null: nobody asks for the bias gradient
  int rows, columns;  // of dy
  int rows_per_part;
  Function function;
};

struct Point {
  float value, slope;
};
__device__ __forceinline__ Point gelu(float u) {
  const float cdf = 0.5f * (1.f + erff(u * 0.70710678118654752f));
  return {u * cdf, cdf + u * expf(-0.5f * u * u) * 0.39894228040143268f};
}
__device__ __forceinline__ Point gelu_tanh(float u) {
  const float cubic = 0.044715f * u * u, scale = 0.79788456080286536f;
  const float t = tanhf(scale * u * (1.f + cubic));
  return {0.5f * u * (1.f + t), 0.5f * (1.f + t + u * (1.f - t * t) * scale * (1.f + 3.f * cubic))};
}
__device__ __forceinline__ Point silu(float u) {
  const float sigmoid = 1.f / (1.f + expf(-u));
  return {u * sigmoid, sigmoid * (1.f + u * (1.f - sigmoid))};
}
// The branch is the same in every thread; what the caller does not use is not computed.
__device__ __forceinline__ Point at(Function function, float u) {
  switch (function) {
    case Function::Gelu: return gelu(u);
    case Function::GeluTanh: return gelu_tanh(u);
    case Function::Relu:
      return {u > 0.f || u != u ? u : 0.f, u <= 0.f ? 0.f : 1.f};  // NaN stays NaN
    case Function::Silu: return silu(u);
    default: {
      const float t = tanhf(u);
      return {t, 1.f - t * t};
    }
  }
}

constexpr int kForwardThreads = 256;

// One thread a chunk of y. grid: ceil(T · ceil(N / 8) / 256)
template <class S, bool kGated>
__device__ void forward(const Forward& p) {
  const int chunks = ceil_div(p.columns, kChunk), width = kGated ? 2 * p.columns : p.columns;
  const size_t i = size_t(blockIdx.x) * kForwardThreads + threadIdx.x;
  const size_t row = i / chunks;
  const int column = int(i % chunks) * kChunk;
  if (row >= size_t(p.rows)) return;
  const S* h = static_cast<const S*>(p.h) + row * width;
  float u[kChunk], bias[kChunk];
  load(u, h, column, p.columns);
  load_or_zero(bias, p.bias, column, p.columns);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) u[e] = at(p.function, u[e] + bias[e]).value;
  if (kGated) {
    float gate[kChunk];
    load(gate, h + p.columns, column, p.columns);
    load_or_zero(bias, p.bias ? p.bias + p.columns : nullptr, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) u[e] *= gate[e] + bias[e];
  }
  store(static_cast<S*>(p.y) + row * p.columns, column, p.columns, u);
}

// dh of one chunk: d_input, and d_gate where there is a gate.
template <class S, bool kGated>
__device__ __forceinline__ void slope(const Backward& p, size_t row, int column,
                                      float (&d_input)[kChunk], float (&d_gate)[kChunk]) {
  const int width = kGated ? 2 * p.columns : p.columns;
  const S* h = static_cast<const S*>(p.h) + row * width;
  S* dh = static_cast<S*>(p.dh) + row * width;
  float dy[kChunk], u[kChunk], bias[kChunk], gate[kChunk];
  load(dy, static_cast<const S*>(p.dy) + row * p.columns, column, p.columns);
  load(u, h, column, p.columns);
  load_or_zero(bias, p.bias, column, p.columns);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const Point point = at(p.function, u[e] + bias[e]);
    d_input[e] = dy[e] * point.slope;
    d_gate[e] = dy[e] * point.value;
  }
  if (kGated) {
    load(gate, h + p.columns, column, p.columns);
    load_or_zero(bias, p.bias ? p.bias + p.columns : nullptr, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) d_input[e] *= gate[e] + bias[e];
    store(dh + p.columns, column, p.columns, d_gate);
  }
  store(dh, column, p.columns, d_input);
}

// A block takes a strip of columns and `rows_per_part` rows. grid: (ceil(N / 256), parts)
template <class S, bool kGated>
__device__ void backward(const Backward& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int first = int(blockIdx.y) * p.rows_per_part, end = min(first + p.rows_per_part, p.rows);
  float input_sum[kChunk] = {}, gate_sum[kChunk] = {};
  for (int row = first + int(threadIdx.x / 32); row < end && column < p.columns;
       row += kStripWarps) {
    float d_input[kChunk], d_gate[kChunk];
    slope<S, kGated>(p, size_t(row), column, d_input, d_gate);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) input_sum[e] += d_input[e], gate_sum[e] += d_gate[e];
  }
  if (!p.partials) return;
  const int own = strip + strip_column();
  float* partials = p.partials + size_t(blockIdx.y) * (kGated ? 2 * p.columns : p.columns);
  const float input = strip_sum(input_sum, scratch);
  if (own < p.columns) partials[own] = input;
  if (kGated) {
    const float gate = strip_sum(gate_sum, scratch);
    if (own < p.columns) partials[p.columns + own] = gate;
  }
}
}  // namespace

KERNEL(activation_forward_f32, kForwardThreads, Forward, forward<float, false>)
KERNEL(activation_forward_bf16, kForwardThreads, Forward, forward<bf16, false>)
KERNEL(activation_gated_forward_f32, kForwardThreads, Forward, forward<float, true>)
KERNEL(activation_gated_forward_bf16, kForwardThreads, Forward, forward<bf16, true>)
KERNEL(activation_backward_f32, kStrip, Backward, backward<float, false>)
KERNEL(activation_backward_bf16, kStrip, Backward, backward<bf16, false>)
KERNEL(activation_gated_backward_f32, kStrip, Backward, backward<float, true>)
KERNEL(activation_gated_backward_bf16, kStrip, Backward, backward<bf16, true>)
