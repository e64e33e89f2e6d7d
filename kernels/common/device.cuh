// device.cuh: the thin layer that every kernel is written on, and includes instead of CUDA's
// headers.
//
// nvcc (sm_80 and later) takes CUDA's own; any other compiler takes host_run/, which runs the same
// kernels on the CPU. Owns how a kernel is declared, loads and stores of 8 columns in f32 or bf16,
// sums over warps and blocks in a fixed order, and dropout. Tensor cores are tensor_core.cuh's.
//
// Legend: T tokens, B sequences, H or N columns; a chunk is 8 neighbouring columns, what one Philox
// block decides and, in bf16, 16 bytes.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
// A kernel `name` of blocks of `threads` threads that calls the function given last with one
// `Parameters` by value, a struct that Rust mirrors.
#define KERNEL(name, threads, Parameters, ...)                                              \
  extern "C" __global__ void __launch_bounds__(threads) name(const Parameters parameters) { \
    __VA_ARGS__(parameters);                                                                \
  }
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
#define SHARED_DYNAMIC(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "host_run/collectives.hpp"
// On the host it is a function that runs the whole grid and returns what went wrong, or null.
#define KERNEL(name, threads, Parameters, ...)                                                   \
  extern "C" const char* host_##name(const unsigned(&grid)[3], unsigned block,                   \
                                     size_t shared_bytes, const Parameters& parameters,          \
                                     size_t parameter_bytes) {                                   \
    if (parameter_bytes != sizeof(Parameters))                                                   \
      return #name ": the parameters have another layout";                                       \
    if (block != (threads)) return #name ": the blocks have another number of threads";          \
    return ::host_run::launch<Parameters, __VA_ARGS__>(grid, threads, shared_bytes, parameters); \
  }
#define SHARED_ARRAY(T, name, n)    \
  static const char name##_key = 0; \
  T(&name)[n] = *reinterpret_cast<T(*)[n]>(::host_run::static_shared(&name##_key, sizeof(T) * (n)))
#define SHARED_DYNAMIC(name) unsigned char* name = ::host_run::dynamic_shared()
#endif

using bf16 = __nv_bfloat16;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kChunk = 8;

// ------------------------------------------------------------------------------ elements and
// chunks
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float& to, float v) { to = v; }
__device__ __forceinline__ void narrow(bf16& to, float v) { to = __float2bfloat16_rn(v); }

// Two bf16 in a word, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);  // one instruction
  return reinterpret_cast<const uint32_t&>(pair);
#else
  return uint32_t(__float2bfloat16_rn(high).bits) << 16 | __float2bfloat16_rn(low).bits;
#endif
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t v) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

// The vector at `p`, which must be aligned to its size: the host run looks, a device faults.
#ifdef __CUDACC__
template <class V>
__device__ __forceinline__ V& vector_at(void* p) {
  return *static_cast<V*>(p);
}
template <class V>
__device__ __forceinline__ const V& vector_at(const void* p) {
  return *static_cast<const V*>(p);
}
#else
template <class V>
inline V& vector_at(void* p, host_run::Site at = host_run::Site::here()) {
  host_run::require_aligned(p, sizeof(V), at);
  return *static_cast<V*>(p);
}
template <class V>
inline const V& vector_at(const void* p, host_run::Site at = host_run::Site::here()) {
  host_run::require_aligned(p, sizeof(V), at);
  return *static_cast<const V*>(p);
}
#endif

__device__ __forceinline__ void load_whole(float (&v)[kChunk], const bf16* from) {
  const int4 raw = vector_at<int4>(from);
  const float2 pairs[4] = {unpack_bf16(raw.x), unpack_bf16(raw.y), unpack_bf16(raw.z),
                           unpack_bf16(raw.w)};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[2 * i] = pairs[i].x, v[2 * i + 1] = pairs[i].y;
}
__device__ __forceinline__ void load_whole(float (&v)[kChunk], const float* from) {
  const float4 a = vector_at<float4>(from), b = vector_at<float4>(from + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void store_whole(bf16* to, const float (&v)[kChunk]) {
  vector_at<int4>(to) = make_int4(int(pack_bf16(v[0], v[1])), int(pack_bf16(v[2], v[3])),
                                  int(pack_bf16(v[4], v[5])), int(pack_bf16(v[6], v[7])));
}
__device__ __forceinline__ void store_whole(float* to, const float (&v)[kChunk]) {
  vector_at<float4>(to) = make_float4(v[0], v[1], v[2], v[3]);
  vector_at<float4>(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

// Columns `column` to `column + 7` of a row of `columns`; zeros past its end. Rows start aligned
// when their width is a multiple of 8, as every model's is; others go one element at a time.
template <class S>
__device__ __forceinline__ void load(float (&v)[kChunk], const S* row, int column, int columns) {
  if (columns % kChunk == 0) return load_whole(v, row + column);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) v[e] = column + e < columns ? widen(row[column + e]) : 0.f;
}
template <class S>
__device__ __forceinline__ void store(S* row, int column, int columns, const float (&v)[kChunk]) {
  if (columns % kChunk == 0) return store_whole(row + column, v);
#pragma unroll
  for (int e = 0; e < kChunk; ++e)
    if (column + e < columns) narrow(row[column + e], v[e]);
}
// The same of a vector that may be missing: then zeros.
__device__ __forceinline__ void load_or_zero(float (&v)[kChunk], const float* row, int column,
                                             int columns) {
  if (row) return load(v, row, column, columns);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) v[e] = 0;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// -------------------------------------------------------------------------------------------- sums
// Sum over the 32 lanes, the same in each.
template <class F>
__device__ __forceinline__ F warp_sum(F v) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}

// Sum over the block's kWarps warps, the same in each thread. `scratch` holds kWarps values.
template <int kWarps, class F>
__device__ __forceinline__ F block_sum(F v, F* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  F sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  __syncthreads();  // before the next caller writes scratch
  return sum;
}

// Kernels that sum over rows: a block is 8 warps, which share 256 columns (a strip), one chunk a
// lane, and take every eighth row each.
constexpr int kStrip = 256, kStripWarps = kStrip / 32, kStripScratch = kStrip * kStripWarps;

// The sum over the block's warps of chunk values: a thread gets that of column `strip_column()` of
// the strip. `scratch` holds kStripScratch floats.
__device__ __forceinline__ int strip_column() {
  return int(threadIdx.x % 32) * kChunk + int(threadIdx.x / 32);
}
__device__ __forceinline__ float strip_sum(const float (&v)[kChunk], float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) scratch[warp * kStrip + e * 32 + lane] = v[e];
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kStripWarps; ++w) sum += scratch[w * kStrip + threadIdx.x];
  __syncthreads();  // before the next caller writes scratch
  return sum;
}

// ----------------------------------------------------------------------------------------- dropout
// Philox4x32-10 (Salmon et al. 2011), as common/philox.rs.
__device__ __forceinline__ uint4 philox(uint4 c, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const unsigned high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ key.x, low1, high0 ^ c.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return c;
}

// One dropout of one step, as `Dropout` of common/philox.rs: the same elements are dropped.
struct Dropout {
  unsigned key_low, key_high, step;
  unsigned threshold;  // a 16-bit draw below it drops; 0 drops nothing
  float scale;         // of what is kept
};
// The draws of columns 8·chunk to 8·chunk + 7, two in a word, the lower half first.
__device__ __forceinline__ uint4 draws(const Dropout& d, unsigned sample, unsigned row,
                                       unsigned chunk) {
  return philox(make_uint4(chunk, row, sample, d.step), make_uint2(d.key_low, d.key_high));
}
__device__ __forceinline__ float kept(const Dropout& d, unsigned draw) {
  return draw < d.threshold ? 0.f : d.scale;
}
// Multiplies a chunk by its factors, 0 or scale.
__device__ __forceinline__ void drop(float (&v)[kChunk], const Dropout& d, unsigned sample,
                                     unsigned row, int column) {
  if (d.threshold == 0) return;
  const uint4 words = draws(d, sample, row, unsigned(column) / kChunk);
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] *= kept(d, word[i] & 0xffffu);
    v[2 * i + 1] *= kept(d, word[i] >> 16);
  }
}
// Which sample and position each row's dropout is keyed by (`RowIds`).
struct RowIds {
  const unsigned *sample, *position;
};
