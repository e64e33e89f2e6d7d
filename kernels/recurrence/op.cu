// Steps of LSTM and GRU, forward and backward (the maths is in mod.rs). The product with W_hh is
// cuBLAS's: before a step forward, behind a step backward.
//
// By row of the batch: gates, then d_gx, in one memory, and d_a [T, G·H]; cell f32, h, dh, before
// [T, H]. By place in the order of lengths: product f32, compact d_a [B, G·H]; carry, after f32, state
// [B, H]. By sequence: h0, c0 f32 [B, H]. A thread takes a chunk of units of one row.
#include "../common/device.cuh"

namespace {
constexpr int kThreads = 128;

// Which row a place is at in a step.
struct Step {
  const int *cu_seqlens, *order;
  int active, hidden, step, reverse;
};
struct Forward {
  void* gates;           // gx at first
  const float* product;  // h'·W_hhᵀ
  const float* bias;     // b_hh, may be null
  float* carry;          // c of an LSTM, h of a GRU, of the step before and then of this one
  void* state;           // h, for the next product
  float* cell;           // c of an LSTM, a_n of a GRU
  void* h;
  Step step;
};
struct Backward {
  void* gates;  // d_gx in the end
  const float* cell;
  const void *h, *dh, *h0;  // h0 may be null
  const float* c0;          // may be null
  const float* after;       // e_h by the product
  float* carry;             // e_c of an LSTM, dh·z of a GRU
  void* compact;            // d_a, for the product
  void* d_a;                // the same by row, of a GRU
  void* before;             // h'
  Step step;
};

// The chunk of a thread.
struct Units {
  int place, column, sequence;
  size_t row, before;  // `before` from the second step on
};
__device__ __forceinline__ bool units_of(const Step& s, Units& u) {
  const int chunks = ceil_div(s.hidden, kChunk);
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  u.place = i / chunks, u.column = i % chunks * kChunk;
  if (u.place >= s.active) return false;
  u.sequence = s.order[u.place];
  const int begin = s.cu_seqlens[u.sequence], end = s.cu_seqlens[u.sequence + 1];
  u.row = s.reverse ? end - 1 - s.step : begin + s.step;
  u.before = s.reverse ? u.row + 1 : u.row - 1;
  return true;
}

// expf of what is far below zero is infinite here, and the quotient zero.
__device__ __forceinline__ float sigmoid(float u) { return 1.f / (1.f + expf(-u)); }

// a of gate `gate`, and gx, where the chunk has them.
__device__ __forceinline__ void load_a(float (&a)[kChunk], const Forward& p, const Units& u,
                                       int gates, int gate) {
  const int hidden = p.step.hidden;
  float bias[kChunk];
  load(a, p.product + (size_t(u.place) * gates + gate) * hidden, u.column, hidden);
  load_or_zero(bias, p.bias ? p.bias + size_t(gate) * hidden : nullptr, u.column, hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) a[e] += bias[e];
}
template <class S>
__device__ __forceinline__ S* gate_row(void* gates, const Units& u, int hidden, int count,
                                       int gate) {
  return static_cast<S*>(gates) + (u.row * count + gate) * hidden;
}
template <class S>
__device__ __forceinline__ void load_sum(float (&v)[kChunk], const Forward& p, const Units& u,
                                         int gates, int gate) {
  float x[kChunk];
  load_a(v, p, u, gates, gate);
  load(x, gate_row<S>(p.gates, u, p.step.hidden, gates, gate), u.column, p.step.hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) v[e] += x[e];
}
// h, and c or a_n.
template <class S>
__device__ __forceinline__ void store_state(const Forward& p, const Units& u,
                                            const float (&h)[kChunk], const float (&cell)[kChunk]) {
  const int hidden = p.step.hidden;
  store(static_cast<S*>(p.state) + size_t(u.place) * hidden, u.column, hidden, h);
  store(static_cast<S*>(p.h) + u.row * hidden, u.column, hidden, h);
  store(p.cell + u.row * hidden, u.column, hidden, cell);
}

// grid: ceil(active · ceil(H / 8) / 128)
template <class S>
__device__ void forward_lstm(const Forward& p) {
  Units u;
  if (!units_of(p.step, u)) return;
  const int hidden = p.step.hidden;
  float i[kChunk], f[kChunk], g[kChunk], o[kChunk], c[kChunk], h[kChunk];
  load_sum<S>(i, p, u, 4, 0);
  load_sum<S>(f, p, u, 4, 1);
  load_sum<S>(g, p, u, 4, 2);
  load_sum<S>(o, p, u, 4, 3);
  float* carry = p.carry + size_t(u.place) * hidden;
  load(c, carry, u.column, hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    i[e] = sigmoid(i[e]), f[e] = sigmoid(f[e]), g[e] = tanhf(g[e]), o[e] = sigmoid(o[e]);
    c[e] = f[e] * c[e] + i[e] * g[e];
    h[e] = o[e] * tanhf(c[e]);
  }
  store(gate_row<S>(p.gates, u, hidden, 4, 0), u.column, hidden, i);
  store(gate_row<S>(p.gates, u, hidden, 4, 1), u.column, hidden, f);
  store(gate_row<S>(p.gates, u, hidden, 4, 2), u.column, hidden, g);
  store(gate_row<S>(p.gates, u, hidden, 4, 3), u.column, hidden, o);
  store(carry, u.column, hidden, c);
  store_state<S>(p, u, h, c);
}

// grid: ceil(active · ceil(H / 8) / 128)
template <class S>
__device__ void forward_gru(const Forward& p) {
  Units u;
  if (!units_of(p.step, u)) return;
  const int hidden = p.step.hidden;
  float r[kChunk], z[kChunk], n[kChunk], a[kChunk], h[kChunk];
  load_sum<S>(r, p, u, 3, 0);
  load_sum<S>(z, p, u, 3, 1);
  load_a(a, p, u, 3, 2);
  load(n, gate_row<S>(p.gates, u, hidden, 3, 2), u.column, hidden);
  float* carry = p.carry + size_t(u.place) * hidden;
  load(h, carry, u.column, hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    r[e] = sigmoid(r[e]), z[e] = sigmoid(z[e]);
    n[e] = tanhf(n[e] + r[e] * a[e]);
    h[e] = n[e] + z[e] * (h[e] - n[e]);
  }
  store(gate_row<S>(p.gates, u, hidden, 3, 0), u.column, hidden, r);
  store(gate_row<S>(p.gates, u, hidden, 3, 1), u.column, hidden, z);
  store(gate_row<S>(p.gates, u, hidden, 3, 2), u.column, hidden, n);
  store(carry, u.column, hidden, h);
  store_state<S>(p, u, h, a);
}

// dh of the step, from above and from the product.
template <class S>
__device__ __forceinline__ void load_dh(float (&dh)[kChunk], const Backward& p, const Units& u) {
  const int hidden = p.step.hidden;
  float after[kChunk];
  load(dh, static_cast<const S*>(p.dh) + u.row * hidden, u.column, hidden);
  load(after, p.after + size_t(u.place) * hidden, u.column, hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) dh[e] += after[e];
}
// What the step started from: rows of the batch, or those of the start, or zeros.
template <class S>
__device__ __forceinline__ void load_before(float (&v)[kChunk], const Step& s, const Units& u,
                                            const S* rows, const S* start) {
  const S* from = s.step ? rows + u.before * s.hidden : start;
  if (from && !s.step) from += size_t(u.sequence) * s.hidden;
  if (from) return load(v, from, u.column, s.hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) v[e] = 0;
}
// h', which is left for the gradient of W_hh.
template <class S>
__device__ __forceinline__ void pass_before(float (&h)[kChunk], const Backward& p, const Units& u) {
  const int hidden = p.step.hidden;
  load_before(h, p.step, u, static_cast<const S*>(p.h), static_cast<const S*>(p.h0));
  store(static_cast<S*>(p.before) + u.row * hidden, u.column, hidden, h);
}
// One gate's part of the compact d_a.
template <class S>
__device__ __forceinline__ void store_compact(const Backward& p, const Units& u, int gates,
                                              int gate, const float (&v)[kChunk]) {
  S* row = static_cast<S*>(p.compact) + (size_t(u.place) * gates + gate) * p.step.hidden;
  store(row, u.column, p.step.hidden, v);
}

// grid: ceil(active · ceil(H / 8) / 128)
template <class S>
__device__ void backward_lstm(const Backward& p) {
  Units u;
  if (!units_of(p.step, u)) return;
  const int hidden = p.step.hidden;
  float gate[4][kChunk], c[kChunk], before[kChunk], dh[kChunk], dc[kChunk];
  pass_before<S>(before, p, u);
  load_before(before, p.step, u, p.cell, p.c0);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    load(gate[k], gate_row<S>(p.gates, u, hidden, 4, k), u.column, hidden);
  load(c, p.cell + u.row * hidden, u.column, hidden);
  load_dh<S>(dh, p, u);
  float* carry = p.carry + size_t(u.place) * hidden;
  load(dc, carry, u.column, hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const float i = gate[0][e], f = gate[1][e], g = gate[2][e], o = gate[3][e], t = tanhf(c[e]);
    const float d = dc[e] + dh[e] * o * (1.f - t * t);
    dc[e] = d * f;
    gate[0][e] = d * g * i * (1.f - i);
    gate[1][e] = dc[e] * before[e] * (1.f - f);
    gate[2][e] = d * i * (1.f - g * g);
    gate[3][e] = dh[e] * t * o * (1.f - o);
  }
  store(carry, u.column, hidden, dc);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    store(gate_row<S>(p.gates, u, hidden, 4, k), u.column, hidden, gate[k]);
    store_compact<S>(p, u, 4, k, gate[k]);
  }
}

// grid: ceil(active · ceil(H / 8) / 128)
template <class S>
__device__ void backward_gru(const Backward& p) {
  Units u;
  if (!units_of(p.step, u)) return;
  const int hidden = p.step.hidden;
  float gate[3][kChunk], a[kChunk], before[kChunk], dh[kChunk], carried[kChunk];
  pass_before<S>(before, p, u);
#pragma unroll
  for (int k = 0; k < 3; ++k)
    load(gate[k], gate_row<S>(p.gates, u, hidden, 3, k), u.column, hidden);
  load(a, p.cell + u.row * hidden, u.column, hidden);
  load_dh<S>(dh, p, u);
  float* carry = p.carry + size_t(u.place) * hidden;
  load(carried, carry, u.column, hidden);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const float r = gate[0][e], z = gate[1][e], n = gate[2][e], d = dh[e] + carried[e];
    const float dn = d * (1.f - z) * (1.f - n * n), da = dn * r;
    carried[e] = d * z;
    gate[0][e] = da * a[e] * (1.f - r);
    gate[1][e] = carried[e] * (before[e] - n) * (1.f - z);
    gate[2][e] = dn;
    a[e] = da;
  }
  store(carry, u.column, hidden, carried);
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    store(gate_row<S>(p.gates, u, hidden, 3, k), u.column, hidden, gate[k]);
    store_compact<S>(p, u, 3, k, k < 2 ? gate[k] : a);
    store(gate_row<S>(p.d_a, u, hidden, 3, k), u.column, hidden, k < 2 ? gate[k] : a);
  }
}
}  // namespace

KERNEL(recurrence_forward_lstm_f32, kThreads, Forward, forward_lstm<float>)
KERNEL(recurrence_forward_lstm_bf16, kThreads, Forward, forward_lstm<bf16>)
KERNEL(recurrence_forward_gru_f32, kThreads, Forward, forward_gru<float>)
KERNEL(recurrence_forward_gru_bf16, kThreads, Forward, forward_gru<bf16>)
KERNEL(recurrence_backward_lstm_f32, kThreads, Backward, backward_lstm<float>)
KERNEL(recurrence_backward_lstm_bf16, kThreads, Backward, backward_lstm<bf16>)
KERNEL(recurrence_backward_gru_f32, kThreads, Backward, backward_gru<float>)
KERNEL(recurrence_backward_gru_bf16, kThreads, Backward, backward_gru<bf16>)
