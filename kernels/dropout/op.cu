// Dropout on its own: y = x · factor, and the same of a gradient. x, y [rows, N]; y may be x.
#include "../common/device.cuh"

namespace {
struct Apply {
  const void* x;
  void* y;
  Dropout dropout;
  RowIds ids;
  int rows, columns;
};

constexpr int kThreads = 256;

// One thread a chunk. grid: ceil(rows · ceil(N / 8) / 256)
template <class S>
__device__ void apply(const Apply& p) {
  const int chunks = ceil_div(p.columns, kChunk);
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  const size_t row = i / chunks;
  const int column = int(i % chunks) * kChunk;
  if (row >= size_t(p.rows)) return;
  float v[kChunk];
  load(v, static_cast<const S*>(p.x) + row * p.columns, column, p.columns);
  drop(v, p.dropout, p.ids.sample[row], p.ids.position[row], column);
  store(static_cast<S*>(p.y) + row * p.columns, column, p.columns, v);
}
}  // namespace

KERNEL(dropout_apply_f32, kThreads, Apply, apply<float>)
KERNEL(dropout_apply_bf16, kThreads, Apply, apply<bf16>)
