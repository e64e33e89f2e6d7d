// Bias + dropout + residual + LayerNorm, forward and backward, and the same without the norm (the
// maths is in mod.rs).
//
// x, residual, z, y and their gradients [T, H]; bias, gamma, beta f32 [H]; moments f32 [T, 2].
// With the norm a row is one block's, in registers: 128 threads of up to kChunks chunks each, so H
// is at most 1024 · kChunks. Moments are those of z as it is stored: backward reads no other.
#include "../common/device.cuh"

namespace {
constexpr int kThreads = 128, kWarps = kThreads / 32;

// z = drop(x + bias) + residual
struct Junction {
  const void* x;
  const float* bias;     // may be null
  const void* residual;  // may be null
  Dropout dropout;
  RowIds ids;  // read where there is dropout
};
struct Forward {
  Junction junction;
  const float *gamma, *beta;  // beta may be null
  void *z, *y;
  float* moments;  // mean and rstd of each row
  int rows, columns;
  float eps;
};
struct Backward {
  const void *dy, *z, *past;  // past: what reaches z beside the norm; may be null
  const float *moments, *gamma;
  void *dx, *dz;  // dx null: it is dz, there being no dropout
  Dropout dropout;
  RowIds ids;
  float *gamma_partials, *beta_partials, *bias_partials;  // [parts, H]; each may be null
  int rows, columns, rows_per_part;
};
struct Add {
  Junction junction;
  void* z;
  int rows, columns;
};
struct AddBackward {
  const void* dz;
  void* dx;  // null: it is dz, there being no dropout
  Dropout dropout;
  RowIds ids;
  float* partials;  // [parts, H]; may be null
  int rows, columns, rows_per_part;
};

__device__ __forceinline__ void drop_row(float (&v)[kChunk], const Dropout& dropout,
                                         const RowIds& ids, size_t row, int column) {
  if (dropout.threshold) drop(v, dropout, ids.sample[row], ids.position[row], column);
}

// One chunk of z, before it is rounded.
template <class S>
__device__ __forceinline__ void join(float (&v)[kChunk], const Junction& p, size_t row, int column,
                                     int columns) {
  float other[kChunk];
  load(v, static_cast<const S*>(p.x) + row * columns, column, columns);
  if (p.bias) {
    load(other, p.bias, column, columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v[e] += other[e];
  }
  drop_row(v, p.dropout, p.ids, row, column);
  if (p.residual) {
    load(other, static_cast<const S*>(p.residual) + row * columns, column, columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v[e] += other[e];
  }
}

// grid: T
template <class S, int kChunks>
__device__ void forward(const Forward& p) {
  SHARED_ARRAY(float, scratch, kWarps);
  const size_t row = blockIdx.x;
  const int columns = p.columns;
  float v[kChunks][kChunk] = {}, sum = 0, square = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (int(threadIdx.x) + i * kThreads) * kChunk;
    if (column >= columns) continue;
    join<S>(v[i], p.junction, row, column, columns);
    store(static_cast<S*>(p.z) + row * columns, column, columns, v[i]);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      S stored;
      narrow(stored, v[i][e]);
      sum += v[i][e] = widen(stored);
    }
  }
  const float mean = block_sum<kWarps>(sum, scratch) / float(columns);
  // A second pass, over registers: E(z²) - mean² would cancel.
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      const bool present = (int(threadIdx.x) + i * kThreads) * kChunk + e < columns;
      v[i][e] = present ? v[i][e] - mean : 0.f;
      square += v[i][e] * v[i][e];
    }
  const float rstd = rsqrtf(block_sum<kWarps>(square, scratch) / float(columns) + p.eps);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (int(threadIdx.x) + i * kThreads) * kChunk;
    if (column >= columns) continue;
    float gamma[kChunk], beta[kChunk];
    load(gamma, p.gamma, column, columns);
    load_or_zero(beta, p.beta, column, columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v[i][e] = v[i][e] * rstd * gamma[e] + beta[e];
    store(static_cast<S*>(p.y) + row * columns, column, columns, v[i]);
  }
  if (threadIdx.x == 0) p.moments[2 * row] = mean, p.moments[2 * row + 1] = rstd;
}

// A thread's column sums over the rows of its block.
template <int kChunks>
struct Sums {
  float gamma[kChunks][kChunk], beta[kChunks][kChunk], bias[kChunks][kChunk];
};

template <int kChunks>
__device__ __forceinline__ void store_sums(float* partials, const float (&sums)[kChunks][kChunk],
                                           int columns) {
  if (!partials) return;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (int(threadIdx.x) + i * kThreads) * kChunk;
    if (column < columns) store(partials + size_t(blockIdx.x) * columns, column, columns, sums[i]);
  }
}

// dz and dx of one chunk, from the gradient through the norm; adds to the bias's sums.
template <class S>
__device__ __forceinline__ void pass_on(float (&v)[kChunk], const Backward& p, size_t row,
                                        int column, float (&bias_sum)[kChunk]) {
  const int columns = p.columns;
  if (p.past) {
    float past[kChunk];
    load(past, static_cast<const S*>(p.past) + row * columns, column, columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v[e] += past[e];
  }
  store(static_cast<S*>(p.dz) + row * columns, column, columns, v);
  drop_row(v, p.dropout, p.ids, row, column);
  if (p.dx) store(static_cast<S*>(p.dx) + row * columns, column, columns, v);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) bias_sum[e] += v[e];
}

template <class S, int kChunks>
__device__ __forceinline__ void backward_row(const Backward& p, size_t row, Sums<kChunks>& sums,
                                             float* scratch) {
  const int columns = p.columns;
  const float mean = p.moments[2 * row], rstd = p.moments[2 * row + 1];
  float normed[kChunks][kChunk] = {}, g[kChunks][kChunk] = {}, sum = 0, dot = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (int(threadIdx.x) + i * kThreads) * kChunk;
    if (column >= columns) continue;
    float gamma[kChunk];
    load(normed[i], static_cast<const S*>(p.z) + row * columns, column, columns);
    load(g[i], static_cast<const S*>(p.dy) + row * columns, column, columns);
    load(gamma, p.gamma, column, columns);
#pragma unroll
    for (int e = 0; e < kChunk;
         ++e) {  // past the row's end dy and gamma are 0, and so are the sums
      normed[i][e] = (normed[i][e] - mean) * rstd;
      sums.gamma[i][e] += g[i][e] * normed[i][e];
      sums.beta[i][e] += g[i][e];
      g[i][e] *= gamma[e];
      sum += g[i][e];
      dot += g[i][e] * normed[i][e];
    }
  }
  const float mean_g = block_sum<kWarps>(sum, scratch) / float(columns);
  const float mean_gz = block_sum<kWarps>(dot, scratch) / float(columns);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (int(threadIdx.x) + i * kThreads) * kChunk;
    if (column >= columns) continue;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) g[i][e] = rstd * (g[i][e] - mean_g - normed[i][e] * mean_gz);
    pass_on<S>(g[i], p, row, column, sums.bias[i]);
  }
}

// grid: parts, of rows_per_part rows each
template <class S, int kChunks>
__device__ void backward(const Backward& p) {
  SHARED_ARRAY(float, scratch, kWarps);
  const int first = int(blockIdx.x) * p.rows_per_part, end = min(first + p.rows_per_part, p.rows);
  Sums<kChunks> sums = {};
  for (int row = first; row < end; ++row) backward_row<S, kChunks>(p, size_t(row), sums, scratch);
  store_sums(p.gamma_partials, sums.gamma, p.columns);
  store_sums(p.beta_partials, sums.beta, p.columns);
  store_sums(p.bias_partials, sums.bias, p.columns);
}

constexpr int kAddThreads = 256;

// One thread a chunk. grid: ceil(T · ceil(H / 8) / 256)
template <class S>
__device__ void add(const Add& p) {
  const int chunks = ceil_div(p.columns, kChunk);
  const size_t i = size_t(blockIdx.x) * kAddThreads + threadIdx.x;
  const size_t row = i / chunks;
  const int column = int(i % chunks) * kChunk;
  if (row >= size_t(p.rows)) return;
  float v[kChunk];
  join<S>(v, p.junction, row, column, p.columns);
  store(static_cast<S*>(p.z) + row * p.columns, column, p.columns, v);
}

// A block takes a strip of columns and `rows_per_part` rows. grid: (ceil(H / 256), parts)
template <class S>
__device__ void add_backward(const AddBackward& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int first = int(blockIdx.y) * p.rows_per_part, end = min(first + p.rows_per_part, p.rows);
  float sum[kChunk] = {};
  for (int row = first + int(threadIdx.x / 32); row < end && column < p.columns;
       row += kStripWarps) {
    float v[kChunk];
    load(v, static_cast<const S*>(p.dz) + size_t(row) * p.columns, column, p.columns);
    drop_row(v, p.dropout, p.ids, size_t(row), column);
    if (p.dx) store(static_cast<S*>(p.dx) + size_t(row) * p.columns, column, p.columns, v);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum[e] += v[e];
  }
  if (!p.partials) return;
  const float total = strip_sum(sum, scratch);
  const int own = strip + strip_column();
  if (own < p.columns) p.partials[size_t(blockIdx.y) * p.columns + own] = total;
}
}  // namespace

// For rows of up to 1024, 2048 and 4096 columns.
#define NORM(S, type)                                                   \
  KERNEL(norm_forward_1024_##type, kThreads, Forward, forward<S, 1>)    \
  KERNEL(norm_forward_2048_##type, kThreads, Forward, forward<S, 2>)    \
  KERNEL(norm_forward_4096_##type, kThreads, Forward, forward<S, 4>)    \
  KERNEL(norm_backward_1024_##type, kThreads, Backward, backward<S, 1>) \
  KERNEL(norm_backward_2048_##type, kThreads, Backward, backward<S, 2>) \
  KERNEL(norm_backward_4096_##type, kThreads, Backward, backward<S, 4>) \
  KERNEL(norm_add_##type, kAddThreads, Add, add<S>)                     \
  KERNEL(norm_add_backward_##type, kStrip, AddBackward, add_backward<S>)
NORM(float, f32)
NORM(bf16, bf16)
