// codes.cuh: values of quantised weights from their codes, 8 neighbouring columns at a time. Rust keeps
// codes as bytes in whole words of 16; a kernel loads words, never a byte.
#pragma once
#include "../common/device.cuh"

constexpr float kLargestCode = 127.f;
constexpr int kBlock = 64;            // elements of 4 bits that share a scale
constexpr int kScalesABlock = 256;    // of which as many share a scale in turn

// Byte `i` of `bytes`.
__device__ __forceinline__ unsigned byte_at(const unsigned* bytes, size_t i) {
  return bytes[i / 4] >> 8 * unsigned(i % 4) & 0xffu;
}
// Byte `i` of a word as a code from -127 to 127.
__device__ __forceinline__ float int8_of(unsigned word, int i) {
  return float(int(word << (24 - 8 * i)) >> 24);
}

// Columns `column` to `column + 7` of the row of int8 codes that starts at code `start`, without their
// scale; zeros past the row's end. Rows of a multiple of 8 columns start aligned.
__device__ __forceinline__ void load_int8(float (&v)[kChunk], const void* codes, size_t start,
                                          int column, int columns) {
  const auto words = static_cast<const unsigned*>(codes);
  const size_t first = start + column;
  if (columns % kChunk == 0) {
    const uint2 raw = vector_at<uint2>(words + first / 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = int8_of(raw.x, e), v[e + 4] = int8_of(raw.y, e);
    return;
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e)
    v[e] = column + e < columns ? int8_of(byte_at(words, first + e), 0) : 0.f;
}

// What 4-bit codes are decoded with, and the scales of their blocks in 8 bits.
struct FourBit {
  const unsigned* packed;  // 2 codes a byte, the earlier in its upper half
  const unsigned* scales;  // p: a byte for each block of 64
  const float* largest;    // m: one for each 256 of those
  const float* code8;      // d [256]
  float offset;            // o
  float code4[16];
};

// The scale of block `i`: product and sum are rounded each, as on the CPU.
__device__ __forceinline__ float block_scale(const FourBit& w, size_t i) {
  const float distance = __fmul_rn(w.code8[byte_at(w.scales, i)], w.largest[i / kScalesABlock]);
  return __fadd_rn(distance, w.offset);
}
// The 8 elements whose codes are in a word, without their scale; `code4` is the kernel's copy, in shared
// memory. Their bytes lie in order, the upper half of each first.
__device__ __forceinline__ void load_four_bit(float (&v)[kChunk], const FourBit& w,
                                              const float* code4, size_t element) {
  const unsigned word = w.packed[element / kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; e += 2) {
    v[e] = code4[word >> (4 * e + 4) & 15u];
    v[e + 1] = code4[word >> (4 * e) & 15u];
  }
}
