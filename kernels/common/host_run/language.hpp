// language.hpp: what the CUDA language has and C++ has not, for a host compiler: qualifiers, vector
// types, arithmetic intrinsics and bfloat16. How threads run is execution.hpp's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

// CUDA's vectors are aligned to their size.
#define HOST_RUN_VECTOR(T, N)                           \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };       \
  struct alignas(4 * sizeof(T)) N##4 { T x, y, z, w; }; \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }  \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_RUN_VECTOR(float, float)
HOST_RUN_VECTOR(int, int)
HOST_RUN_VECTOR(unsigned, uint)
#undef HOST_RUN_VECTOR

inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
// Rounded each: never one fused instruction.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
// To nearest, ties to even; NaN becomes the canonical NaN, as on the device.
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t u = __float_as_uint(v);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
