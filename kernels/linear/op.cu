// What a linear needs beside its matrix products, which are cuBLAS's: the bias under y, and its
// gradient, sums over rows (the maths is in mod.rs).
//
// y, dy [T, N]; bias f32 [N]. The sums are left in f32 as [parts, N], for `add_partials`.
#include "../common/device.cuh"

namespace {
struct FillBias {
  const float* bias;
  void* y;
  int rows, columns;
};
struct SumRows {
  const void* dy;
  float* partials;  // [parts, N]
  int rows, columns, rows_per_part;
};

// Makes every row of y the bias; the product is added to it (beta = 1). A block writes kStripWarps
// rows of a strip. grid: (ceil(T / 8), ceil(N / 256))
template <class S>
__device__ void fill_bias(const FillBias& p) {
  const int column = int(blockIdx.y) * kStrip + int(threadIdx.x % 32) * kChunk;
  const size_t row = size_t(blockIdx.x) * kStripWarps + threadIdx.x / 32;
  if (row >= size_t(p.rows) || column >= p.columns) return;
  float bias[kChunk];
  load(bias, p.bias, column, p.columns);
  store(static_cast<S*>(p.y) + row * p.columns, column, p.columns, bias);
}

// A block takes a strip of columns and `rows_per_part` rows. grid: (ceil(N / 256), parts)
template <class S>
__device__ void sum_rows(const SumRows& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.x) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int first = int(blockIdx.y) * p.rows_per_part, end = min(first + p.rows_per_part, p.rows);
  float sum[kChunk] = {};
  for (int row = first + int(threadIdx.x / 32); row < end && column < p.columns;
       row += kStripWarps) {
    float v[kChunk];
    load(v, static_cast<const S*>(p.dy) + size_t(row) * p.columns, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum[e] += v[e];
  }
  const float total = strip_sum(sum, scratch);
  const int own = strip + strip_column();
  if (own < p.columns) p.partials[size_t(blockIdx.y) * p.columns + own] = total;
}
}  // namespace

KERNEL(linear_fill_bias_f32, kStrip, FillBias, fill_bias<float>)
KERNEL(linear_fill_bias_bf16, kStrip, FillBias, fill_bias<bf16>)
KERNEL(linear_sum_rows_f32, kStrip, SumRows, sum_rows<float>)
KERNEL(linear_sum_rows_bf16, kStrip, SumRows, sum_rows<bf16>)
