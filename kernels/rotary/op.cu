// Rotary positions: each pair of a head's columns, half a head apart, is rotated by an angle that
// grows with the position (the maths is in mod.rs). Backward is the rotation the other way.
//
// x, y [T, h·d], y may be x; cosines and sines f32 [positions, d/2]; position [T] inside the
// sequence.
#include "../common/device.cuh"

namespace {
struct Rotate {
  const void* x;
  void* y;
  const float *cosines, *sines;
  const unsigned* position;
  int rows, heads, half;
  float direction;  // 1, or -1 for backward
};

constexpr int kThreads = 256;

// One thread a pair. grid: ceil(T · h · d/2 / 256)
template <class S>
__device__ void rotate(const Rotate& p) {
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  const int pair = int(i % p.half);
  const size_t head = i / p.half, row = head / p.heads;
  if (row >= size_t(p.rows)) return;
  const size_t angle = size_t(p.position[row]) * p.half + pair, at = head * 2 * p.half + pair;
  const float cosine = p.cosines[angle], sine = p.sines[angle] * p.direction;
  const S* x = static_cast<const S*>(p.x) + at;
  S* y = static_cast<S*>(p.y) + at;
  const float first = widen(x[0]), second = widen(x[p.half]);
  narrow(y[0], first * cosine - second * sine);
  narrow(y[p.half], second * cosine + first * sine);
}
}  // namespace

KERNEL(rotary_f32, kThreads, Rotate, rotate<float>)
KERNEL(rotary_bf16, kThreads, Rotate, rotate<bf16>)
