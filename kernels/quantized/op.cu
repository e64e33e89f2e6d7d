// Frozen weights of 8 or 4 bits: dequantised into memory for a product of cuBLAS's, or, for few tokens,
// multiplied as they are read (the maths is in mod.rs).
//
// W [N, K] codes, x [T, K], y [T, N]. Ŵ is that of the CPU to the bit, rounded to what it is stored as;
// the fused product does not round it.
#include "codes.cuh"

namespace {
template <class W>
struct Dequantize {
  W weight;
  void* out;                    // [rows, columns], written
  int first_row, first_column;  // where in W that is
  int rows, columns;
  int width;  // K
};
template <class W>
struct FewTokens {
  W weight;
  const void* x;
  const float* bias;  // [N], or null
  void* y;            // written
  int first_row;      // of W
  int tokens, rows;   // T, N
  int width;          // K
};

struct Int8 {
  const void* codes;
  const float* absmax;  // of each row
};

constexpr int kCodes = 16;

// What a block needs to decode, in shared memory.
__device__ __forceinline__ void prepare(float*, const Int8&) {}
__device__ __forceinline__ void prepare(float* code4, const FourBit& w) {
  if (threadIdx.x < kCodes) code4[threadIdx.x] = w.code4[threadIdx.x];
  __syncthreads();
}

// Ŵ[row, column] to Ŵ[row, column + 7]; zeros past the row's end.
__device__ __forceinline__ void load_weight(float (&v)[kChunk], const Int8& w, const float*,
                                            size_t row, int column, int width) {
  load_int8(v, w.codes, row * width, column, width);
  const float scale = w.absmax[row] / kLargestCode;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) v[e] *= scale;
}
__device__ __forceinline__ void load_weight(float (&v)[kChunk], const FourBit& w,
                                            const float* code4, size_t row, int column,
                                            int width) {
  const size_t element = row * width + column;
  load_four_bit(v, w, code4, element);
  const float scale = block_scale(w, element / kBlock);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) v[e] *= scale;
}

constexpr int kDequantizeThreads = 256;

// One thread a chunk. grid: ceil(rows · ceil(columns / 8) / 256)
template <class S, class W>
__device__ void dequantize(const Dequantize<W>& p) {
  SHARED_ARRAY(float, code4, kCodes);
  prepare(code4, p.weight);
  const int chunks = ceil_div(p.columns, kChunk);
  const size_t i = size_t(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  const size_t row = i / chunks;
  const int column = int(i % chunks) * kChunk;
  if (row >= size_t(p.rows)) return;
  float v[kChunk];
  load_weight(v, p.weight, code4, row + p.first_row, column + p.first_column, p.width);
  store(static_cast<S*>(p.out) + row * p.columns, column, p.columns, v);
}

constexpr int kFewThreads = 128, kFewRows = kFewThreads / 32;
constexpr int kTokens = 8;  // that a block multiplies W by as it reads it

// A warp computes one column of y, for 8 tokens. grid: (ceil(N / 4), ceil(T / 8))
template <class S, class W>
__device__ void few_tokens(const FewTokens<W>& p) {
  SHARED_ARRAY(float, code4, kCodes);
  prepare(code4, p.weight);
  const int row = int(blockIdx.x) * kFewRows + int(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int first = int(blockIdx.y) * kTokens;
  if (row >= p.rows) return;
  const S* x = static_cast<const S*>(p.x) + size_t(first) * p.width;
  float sum[kTokens] = {};
  for (int column = lane * kChunk; column < p.width; column += 32 * kChunk) {
    float w[kChunk];
    load_weight(w, p.weight, code4, size_t(row) + p.first_row, column, p.width);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= p.tokens) break;
      float v[kChunk];
      load(v, x + size_t(t) * p.width, column, p.width);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[t] += w[e] * v[e];
    }
  }
  const float bias = p.bias ? p.bias[row] : 0.f;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float total = warp_sum(sum[t]);
    if (lane == t && first + t < p.tokens)
      narrow(static_cast<S*>(p.y)[size_t(first + t) * p.rows + row], total + bias);
  }
}
}  // namespace

KERNEL(quantized_dequantize_int8_f32, kDequantizeThreads, Dequantize<Int8>, dequantize<float, Int8>)
KERNEL(quantized_dequantize_int8_bf16, kDequantizeThreads, Dequantize<Int8>, dequantize<bf16, Int8>)
KERNEL(quantized_dequantize_four_bit_f32, kDequantizeThreads, Dequantize<FourBit>,
       dequantize<float, FourBit>)
KERNEL(quantized_dequantize_four_bit_bf16, kDequantizeThreads, Dequantize<FourBit>,
       dequantize<bf16, FourBit>)
KERNEL(quantized_few_tokens_int8_f32, kFewThreads, FewTokens<Int8>, few_tokens<float, Int8>)
KERNEL(quantized_few_tokens_int8_bf16, kFewThreads, FewTokens<Int8>, few_tokens<bf16, Int8>)
KERNEL(quantized_few_tokens_four_bit_f32, kFewThreads, FewTokens<FourBit>,
       few_tokens<float, FourBit>)
KERNEL(quantized_few_tokens_four_bit_bf16, kFewThreads, FewTokens<FourBit>,
       few_tokens<bf16, FourBit>)
