// Pooling: one row per sequence, from its first, last or all tokens (the maths is in mod.rs).
//
// x, dx [T, H]; y, dy, rows [B, H]; cu_seqlens [B + 1]. A block takes a strip of one sequence's columns,
// where nothing is summed or compared 8 strips.
#include "../common/device.cuh"

namespace {
// In the order of `Pool`.
enum class Pool : int { First, Last, Mean, Max, Ends };

struct Pooling {
  const void* from;  // x, or dy
  void* to;          // y, or dx
  unsigned* rows;    // of a maximum: the row of x that has it; else null
  const int* cu_seqlens;
  int columns;
  Pool pool;
  int skip;  // rows at the head of each sequence that are not its own
};

// Which of a sequence's own rows, from `first` to `last`, speaks for a column of First, Last or Ends.
__device__ __forceinline__ int row_of(const Pooling& p, int first, int last, int column) {
  const bool of_last = p.pool == Pool::Ends ? column < p.columns / 2 : p.pool == Pool::Last;
  return of_last ? last : first;
}

// A chunk a thread. grid: (ceil(H / 2048), B)
template <class S>
__device__ void pick(const Pooling& p) {
  const int column = (int(blockIdx.x) * kStrip + int(threadIdx.x)) * kChunk;
  if (column >= p.columns) return;
  const int first = p.cu_seqlens[blockIdx.y] + p.skip, last = p.cu_seqlens[blockIdx.y + 1] - 1;
  const int row = row_of(p, first, last, column);
  const int other = row_of(p, first, last, column + kChunk - 1);
  const S* x = static_cast<const S*>(p.from);
  float v[kChunk];
  load(v, x + size_t(row) * p.columns, column, p.columns);
  if (other != row) {  // the halves meet within the chunk
    float w[kChunk];
    load(w, x + size_t(other) * p.columns, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
      if (row_of(p, first, last, column + e) == other) v[e] = w[e];
  }
  store(static_cast<S*>(p.to) + size_t(blockIdx.y) * p.columns, column, p.columns, v);
}

// grid: (ceil(H / 256), B)
template <class S>
__device__ void mean(const Pooling& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int first = p.cu_seqlens[blockIdx.y] + p.skip, after = p.cu_seqlens[blockIdx.y + 1];
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

// A column's value so far and the row that has it. What comes first in any order of comparing: a NaN
// before all numbers, then the larger, then the earlier row.
struct Best {
  float value;
  int row;
};
__device__ __forceinline__ void keep_better(Best& best, Best other) {
  const bool nan = best.value != best.value, other_nan = other.value != other.value;
  const bool same = nan ? other_nan : best.value == other.value;
  const bool better = nan ? false : other_nan || other.value > best.value;
  if (better || (same && other.row < best.row)) best = other;
}

// grid: (ceil(H / 256), B)
template <class S>
__device__ void maximum(const Pooling& p) {
  SHARED_ARRAY(float, values, kStripScratch);
  SHARED_ARRAY(int, rows, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int first = p.cu_seqlens[blockIdx.y] + p.skip, after = p.cu_seqlens[blockIdx.y + 1];
  Best best[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) best[e] = {-HUGE_VALF, after};  // a row of -inf comes before it
  for (int row = first + int(threadIdx.x / 32); row < after && column < p.columns;
       row += kStripWarps) {
    float v[kChunk];
    load(v, static_cast<const S*>(p.from) + size_t(row) * p.columns, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) keep_better(best[e], {v[e], row});
  }
  // As strip_sum has it.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    values[warp * kStrip + e * 32 + lane] = best[e].value;
    rows[warp * kStrip + e * 32 + lane] = best[e].row;
  }
  __syncthreads();
  const int own = strip + strip_column();
  if (own >= p.columns) return;
  Best all = {values[threadIdx.x], rows[threadIdx.x]};
#pragma unroll
  for (int w = 1; w < kStripWarps; ++w)
    keep_better(all, {values[w * kStrip + threadIdx.x], rows[w * kStrip + threadIdx.x]});
  const size_t to = size_t(blockIdx.y) * p.columns + own;
  narrow(static_cast<S*>(p.to)[to], all.value);
  p.rows[to] = unsigned(all.row);
}

// grid: (ceil(H / 256), B)
template <class S>
__device__ void backward(const Pooling& p) {
  const int column = int(blockIdx.x) * kStrip + int(threadIdx.x % 32) * kChunk;
  const int begin = p.cu_seqlens[blockIdx.y], end = p.cu_seqlens[blockIdx.y + 1];
  if (column >= p.columns) return;
  const int own = begin + p.skip;
  const size_t from = size_t(blockIdx.y) * p.columns;
  const bool all = p.pool == Pool::Mean;
  float share[kChunk];
  load(share, static_cast<const S*>(p.from) + from, column, p.columns);
  int picked[kChunk];  // the row that gets it, where not all do
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    if (all) share[e] /= float(end - own);
    const bool saved = p.pool == Pool::Max && column + e < p.columns;
    picked[e] = saved ? int(p.rows[from + column + e]) : row_of(p, own, end - 1, column + e);
  }
  for (int row = begin + int(threadIdx.x / 32); row < end; row += kStripWarps) {
    float v[kChunk];
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
      v[e] = row >= own && (all || row == picked[e]) ? share[e] : 0.f;
    store(static_cast<S*>(p.to) + size_t(row) * p.columns, column, p.columns, v);
  }
}
}  // namespace

KERNEL(pooling_pick_f32, kStrip, Pooling, pick<float>)
KERNEL(pooling_pick_bf16, kStrip, Pooling, pick<bf16>)
KERNEL(pooling_mean_f32, kStrip, Pooling, mean<float>)
KERNEL(pooling_mean_bf16, kStrip, Pooling, mean<bf16>)
KERNEL(pooling_max_f32, kStrip, Pooling, maximum<float>)
KERNEL(pooling_max_bf16, kStrip, Pooling, maximum<bf16>)
KERNEL(pooling_backward_f32, kStrip, Pooling, backward<float>)
KERNEL(pooling_backward_bf16, kStrip, Pooling, backward<bf16>)
