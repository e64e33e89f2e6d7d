// Attention pooling, forward and backward (the maths is in mod.rs).
//
// x, dx [T, H]; u, du [T, A]; y, dy [B, H]; weights, scores (their gradients) f32 [T]; v f32 [A];
// cu_seqlens [B + 1]. What needs all rows of a sequence is one block's: a warp a row, then a sum.
#include "../common/device.cuh"

namespace {
constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Weights {
  const void* u;
  const float* v;
  float* weights;
  const int* cu_seqlens;
  int width;  // A
};
struct Pool {
  const void* x;
  const float* weights;
  void* y;
  const int* cu_seqlens;
  int columns;
};
struct Scores {
  const void *x, *dy;
  const float* weights;
  float* scores;
  void* dx;
  const int* cu_seqlens;
  int columns;
};
struct Context {
  const void* u;
  const float *v, *scores;
  void* du;
  float* partials;  // [parts, A]; may be null
  int rows, width, rows_per_part;
};

// The product of two rows, the same in each lane of the warp.
template <class A, class B>
__device__ __forceinline__ float warp_dot(const A* a, const B* b, int columns) {
  float sum = 0;
  for (int column = int(threadIdx.x % 32) * kChunk; column < columns; column += 32 * kChunk) {
    float v[kChunk], w[kChunk];
    load(v, a, column, columns);
    load(w, b, column, columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum += v[e] * w[e];
  }
  return warp_sum(sum);
}

// The largest over the block, the same in each thread. `scratch` holds kWarps values.
__device__ __forceinline__ float block_max(float v, float* scratch) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2)
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, distance));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float most = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) most = fmaxf(most, scratch[warp]);
  __syncthreads();  // before the next caller writes scratch
  return most;
}

// A thread reads and writes the rows begin + threadIdx.x, + kThreads, ... of the scores, which warps
// have left. A NaN among them is no maximum, but makes the sum NaN. grid: B
template <class S>
__device__ void weights(const Weights& p) {
  SHARED_ARRAY(float, scratch, kWarps);
  const int begin = p.cu_seqlens[blockIdx.x], end = p.cu_seqlens[blockIdx.x + 1];
  for (int row = begin + int(threadIdx.x / 32); row < end; row += kWarps) {
    const float score =
        warp_dot(static_cast<const S*>(p.u) + size_t(row) * p.width, p.v, p.width);
    if (threadIdx.x % 32 == 0) p.weights[row] = score;
  }
  __syncthreads();  // all scores are there
  float most = -HUGE_VALF, sum = 0;
  for (int row = begin + int(threadIdx.x); row < end; row += kThreads)
    most = fmaxf(most, p.weights[row]);
  most = block_max(most, scratch);
  for (int row = begin + int(threadIdx.x); row < end; row += kThreads)
    sum += p.weights[row] = expf(p.weights[row] - most);
  sum = block_sum<kWarps>(sum, scratch);
  for (int row = begin + int(threadIdx.x); row < end; row += kThreads) p.weights[row] /= sum;
}

// A block takes a strip of one sequence's columns. grid: (ceil(H / 256), B)
template <class S>
__device__ void pool(const Pool& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int begin = p.cu_seqlens[blockIdx.y], end = p.cu_seqlens[blockIdx.y + 1];
  float sum[kChunk] = {};
  for (int row = begin + int(threadIdx.x / 32); row < end && column < p.columns;
       row += kStripWarps) {
    const float weight = p.weights[row];
    float v[kChunk];
    load(v, static_cast<const S*>(p.x) + size_t(row) * p.columns, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum[e] += weight * v[e];
  }
  const float total = strip_sum(sum, scratch);
  const int own = strip + strip_column();
  if (own < p.columns) narrow(static_cast<S*>(p.y)[size_t(blockIdx.y) * p.columns + own], total);
}

// The gradients of x and of the scores. grid: B
template <class S>
__device__ void scores(const Scores& p) {
  SHARED_ARRAY(float, scratch, kWarps);
  const int begin = p.cu_seqlens[blockIdx.x], end = p.cu_seqlens[blockIdx.x + 1];
  const int columns = p.columns;
  const S* dy = static_cast<const S*>(p.dy) + size_t(blockIdx.x) * columns;
  float mean = 0;  // of this warp's rows, in its first lane
  for (int row = begin + int(threadIdx.x / 32); row < end; row += kWarps) {
    const float weight = p.weights[row];
    const size_t at = size_t(row) * columns;
    const float score = warp_dot(static_cast<const S*>(p.x) + at, dy, columns);
    if (threadIdx.x % 32 == 0) p.scores[row] = score, mean += weight * score;
    for (int column = int(threadIdx.x % 32) * kChunk; column < columns; column += 32 * kChunk) {
      float v[kChunk];
      load(v, dy, column, columns);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) v[e] *= weight;
      store(static_cast<S*>(p.dx) + at, column, columns, v);
    }
  }
  mean = block_sum<kWarps>(mean, scratch);  // all scores are there
  for (int row = begin + int(threadIdx.x); row < end; row += kThreads)
    p.scores[row] = p.weights[row] * (p.scores[row] - mean);
}

// A block takes a strip of columns and `rows_per_part` rows of any sequence. grid: (ceil(A / 256), parts)
template <class S>
__device__ void context(const Context& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int first = int(blockIdx.y) * p.rows_per_part, end = min(first + p.rows_per_part, p.rows);
  float sum[kChunk] = {}, context[kChunk] = {};
  if (column < p.width) load(context, p.v, column, p.width);
  for (int row = first + int(threadIdx.x / 32); row < end && column < p.width;
       row += kStripWarps) {
    const float score = p.scores[row];
    const size_t at = size_t(row) * p.width;
    float v[kChunk];
    load(v, static_cast<const S*>(p.u) + at, column, p.width);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum[e] += score * v[e], v[e] = score * context[e];
    store(static_cast<S*>(p.du) + at, column, p.width, v);
  }
  if (!p.partials) return;
  const float total = strip_sum(sum, scratch);
  const int own = strip + strip_column();
  if (own < p.width) p.partials[size_t(blockIdx.y) * p.width + own] = total;
}
}  // namespace

KERNEL(attention_pooling_weights_f32, kThreads, Weights, weights<float>)
KERNEL(attention_pooling_weights_bf16, kThreads, Weights, weights<bf16>)
KERNEL(attention_pooling_pool_f32, kStrip, Pool, pool<float>)
KERNEL(attention_pooling_pool_bf16, kStrip, Pool, pool<bf16>)
KERNEL(attention_pooling_scores_f32, kThreads, Scores, scores<float>)
KERNEL(attention_pooling_scores_bf16, kThreads, Scores, scores<bf16>)
KERNEL(attention_pooling_context_f32, kStrip, Context, context<float>)
KERNEL(attention_pooling_context_bf16, kStrip, Context, context<bf16>)
