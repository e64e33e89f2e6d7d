// Ragged convolution as one matrix product a group: what each token's taps see is laid side by
// side, and its gradient taken apart again (the maths is in mod.rs). The products are cuBLAS's.
//
// x, dx [T, K]; u, du [T, K·k], column c·k + j for channel c and tap j, the order of W
// [N, K/groups, k] as it is stored; position [T] inside the sequence.
#include "../common/device.cuh"

namespace {
struct Windows {
  const void* from;  // x, or du
  void* to;          // u, or dx
  const unsigned* position;
  int rows, columns, taps;  // T, K, k
};

constexpr int kThreads = 128;

// How many rows before and after `row` are of its sequence, `most` each at most.
struct Reach {
  int before, after;
};
__device__ __forceinline__ Reach reach(const Windows& p, int row, int most) {
  Reach reach = {min(int(p.position[row]), most), 0};
  for (int next = row + 1; reach.after < most && next < p.rows; ++next) {
    if (p.position[next] == 0) break;  // there the next sequence begins
    ++reach.after;
  }
  return reach;
}

// u_(t, c·k + j) = x_(t + j - (k-1)/2, c), or 0. One thread a chunk of u, whose taps of a few
// channels the cache gives. grid: (T, ceil(ceil(K·k / 8) / 128))
template <class S>
__device__ void unfold(const Windows& p) {
  const int row = int(blockIdx.x), border = p.taps / 2, width = p.columns * p.taps;
  const int column = int(blockIdx.y * kThreads + threadIdx.x) * kChunk;
  if (column >= width) return;
  const Reach seen = reach(p, row, border);
  const S* x = static_cast<const S*>(p.from);
  int channel = column / p.taps, shift = column % p.taps - border;
  float v[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const bool inside = channel < p.columns && -seen.before <= shift && shift <= seen.after;
    v[e] = inside ? widen(x[size_t(row + shift) * p.columns + channel]) : 0.f;
    if (++shift > border) shift = -border, ++channel;
  }
  store(static_cast<S*>(p.to) + size_t(row) * width, column, width, v);
}

// dx_(t, c) = Σ_j du_(t - j + (k-1)/2, c·k + j), in the order of j: each element sums what came
// back to it, so nothing is scattered. One thread an element, not a chunk: then a warp's reads of a
// tap lie k elements apart, not 8·k. grid: (T, ceil(K / 128))
template <class S>
__device__ void fold(const Windows& p) {
  const int row = int(blockIdx.x), border = p.taps / 2, width = p.columns * p.taps;
  const int column = int(blockIdx.y * kThreads + threadIdx.x);
  if (column >= p.columns) return;
  const Reach seen = reach(p, row, border);
  const S* du = static_cast<const S*>(p.from) + size_t(column) * p.taps;
  float sum = 0;
  for (int tap = border - seen.after; tap <= border + seen.before; ++tap)
    sum += widen(du[size_t(row + border - tap) * width + tap]);
  narrow(static_cast<S*>(p.to)[size_t(row) * p.columns + column], sum);
}
}  // namespace

KERNEL(convolution_unfold_f32, kThreads, Windows, unfold<float>)
KERNEL(convolution_unfold_bf16, kThreads, Windows, unfold<bf16>)
KERNEL(convolution_fold_f32, kThreads, Windows, fold<float>)
KERNEL(convolution_fold_bf16, kThreads, Windows, fold<bf16>)
