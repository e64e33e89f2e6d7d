// Pooling: one row per sequence, from its first, last or all tokens (the maths is in mod.rs).
//
// x, dx [T, H]; y, dy [B, H]; cu_seqlens [B + 1]. A block takes a strip of one sequence's columns.
#include "../common/device.cuh"

namespace {
// In the order of `Pool`.
enum class Pool : int { First, Last, Mean };

struct Pooling {
  const void* from;  // x, or dy
  void* to;          // y, or dx
  const int* cu_seqlens;
  int columns;
  Pool pool;
  int skip;  // rows at the head of each sequence that are not its own
};

// grid: (ceil(H / 256), B)
template <class S>
__device__ void forward(const Pooling& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int begin = p.cu_seqlens[blockIdx.y] + p.skip, end = p.cu_seqlens[blockIdx.y + 1];
  const int first = p.pool == Pool::Last ? end - 1 : begin;
  const int after = p.pool == Pool::First ? begin + 1 : end;
  float sum[kChunk] = {};
  for (int row = first + int(threadIdx.x / 32); row < after && column < p.columns;
       row += kStripWarps) {
    float v[kChunk];
    load(v, static_cast<const S*>(p.from) + size_t(row) * p.columns, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum[e] += v[e];
  }
  const float total = strip_sum(sum, scratch);
  const int own = strip + strip_column();
  if (own < p.columns)
    narrow(static_cast<S*>(p.to)[size_t(blockIdx.y) * p.columns + own],
           total / float(after - first));
}

// grid: (ceil(H / 256), B)
template <class S>
__device__ void backward(const Pooling& p) {
  const int column = int(blockIdx.x) * kStrip + int(threadIdx.x % 32) * kChunk;
  const int begin = p.cu_seqlens[blockIdx.y], end = p.cu_seqlens[blockIdx.y + 1];
  if (column >= p.columns) return;
  const int own = begin + p.skip;
  const int first = p.pool == Pool::Last ? end - 1 : own;
  const int after = p.pool == Pool::First ? own + 1 : end;
  const float tokens = float(after - first);
  float share[kChunk];
  const float zeros[kChunk] = {};
  load(share, static_cast<const S*>(p.from) + size_t(blockIdx.y) * p.columns, column, p.columns);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) share[e] /= tokens;
  for (int row = begin + int(threadIdx.x / 32); row < end; row += kStripWarps) {
    S* to = static_cast<S*>(p.to) + size_t(row) * p.columns;
    if (row >= first && row < after)
      store(to, column, p.columns, share);
    else
      store(to, column, p.columns, zeros);
  }
}
}  // namespace

KERNEL(pooling_forward_f32, kStrip, Pooling, forward<float>)
KERNEL(pooling_forward_bf16, kStrip, Pooling, forward<bf16>)
KERNEL(pooling_backward_f32, kStrip, Pooling, backward<float>)
KERNEL(pooling_backward_bf16, kStrip, Pooling, backward<bf16>)
