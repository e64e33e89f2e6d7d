// position.cuh: the relative positions of one 64 x 64 tile of scores.
//
// The slot of a distance grows with it in steps of at most 1, so the 127 distances of a tile need
// one run of at most 127 rows of PK and PQ, and 16 of its rows (or columns) at most 79 of them: 10
// n-tiles. A tile's rows are `own` (a block keeps them), its columns `walk`; place = own - walk +
// 63 counts its distances, and rel[place] is the row of the run. Queries own: the run ascends in
// the table. Keys own: the distance is negated, so it descends; nothing else differs.
#pragma once
#include "../attention/tile.cuh"

constexpr int kRun = 128;        // rows of a table that a tile may need (127, rounded up)
constexpr int kWarpRun = 80;     // of which 16 rows need (79, rounded up)
constexpr int kBiasStride = 88;  // 24 mod 32: stores of accumulators meet no bank conflict
constexpr int kRunBytes = kRun * kHead * 2, kBiasBytes = kTile * kBiasStride * 4;
static_assert(16 * kBiasStride * 4 >= kDrawBytes / 4, "a warp's draws fit over its own products");

// PK and PQ are [R, stride] bf16, head h at columns 64h; each may be null. slots [2·center + 1] by
// i - j + center; partials f32 [gridDim.x, h, R, 64] of dPK (queries own) or dPQ (keys own), may be
// null.
struct Positions {
  const bf16 *pk, *pq;
  const int* slots;
  float* partials;
  int stride, center, rows;
  int tiles;  // of the work
};

__device__ __forceinline__ int slot_at(const Positions& p, int difference, int length) {
  return p.slots[min(max(difference, 1 - length), length - 1) + p.center];
}

// The run of a tile: its row r is the table's base + r, or base - r where keys own.
struct Run {
  int base, rows;
};
template <bool kKeysOwn>
__device__ __forceinline__ Run run_of(const Positions& p, int difference, int length) {
  const int sign = kKeysOwn ? -1 : 1;
  const int base = slot_at(p, sign * (difference - 63), length);
  return {base, sign * (slot_at(p, sign * (difference + 63), length) - base) + 1};
}
template <bool kKeysOwn>
__device__ __forceinline__ int row_of_run(const Positions& p, int difference, int place, int length,
                                          Run run) {
  const int sign = kKeysOwn ? -1 : 1;
  return sign * (slot_at(p, sign * (difference - 63 + place), length) - run.base);
}
// Starts copying the run's rows of a table at this head; nothing where there is no table.
template <bool kKeysOwn>
__device__ __forceinline__ void load_run(unsigned char* to, const bf16* table, const Positions& p,
                                         Run run) {
  if (!table) return;
  const bf16* first = table + blockIdx.y * kHead + size_t(run.base) * p.stride;
  load_rows<kRun>(to, first, kKeysOwn ? -p.stride : p.stride, run.rows);
}

// out[16 x 80] = a[16 x 64] rows[first .. first + columns)ᵀ in f32, whole 16s of columns.
__device__ __forceinline__ void position_product(float* out, const uint32_t (&a)[4][4],
                                                 unsigned char* rows, int first, int columns,
                                                 int lane) {
  for (int n = 0; n < columns; n += 16) {
    float acc[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t b[4];
      load_b(b, rows, first + n, k, lane);
      multiply_add(acc[0], a[k], b[0], b[1]);
      multiply_add(acc[1], a[k], b[2], b[3]);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        vector_at<float2>(out + (lane / 4 + 8 * half) * kBiasStride + n + 8 * m + 2 * (lane % 4)) =
            make_float2(acc[m][2 * half], acc[m][2 * half + 1]);
  }
}

// What the scores of a tile are made of besides own·walk: products with the tables, [64,
// kBiasStride] each, of all own rows and all walking rows. Null where there is no table.
struct Bias {
  float *own, *walk;
};
// The first place of the own rows of warp w is 16w, of the walking rows of warp w 48 - 16w; 79
// each.
__device__ __forceinline__ void own_products(float* out, const uint32_t (&own)[4][4],
                                             unsigned char* rows, const int16_t* rel, int warp,
                                             int lane) {
  const int first = rel[16 * warp];
  position_product(out + 16 * warp * kBiasStride, own, rows, first, rel[16 * warp + 78] - first + 1,
                   lane);
}
__device__ __forceinline__ void walk_products(float* out, unsigned char* walk_tile,
                                              unsigned char* rows, const int16_t* rel, int warp,
                                              int lane) {
  const int first = rel[48 - 16 * warp];
  uint32_t walk[4][4];
  load_rows_a(walk, walk_tile, 16 * warp, lane);
  position_product(out + 16 * warp * kBiasStride, walk, rows, first,
                   rel[126 - 16 * warp] - first + 1, lane);
}
// s += both products at each element's place, for this warp's 16 own rows.
__device__ __forceinline__ void add_positions(float (&s)[8][4], const Bias& bias,
                                              const int16_t* rel, int warp, int lane) {
  const int own_first = rel[16 * warp];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int walk_first = rel[48 - 16 * (n / 2)];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int own = 16 * warp + lane / 4 + 8 * (e >> 1), walk = 8 * n + 2 * (lane % 4) + (e & 1);
      const int r = rel[own - walk + 63];
      if (bias.own) s[n][e] += bias.own[own * kBiasStride + r - own_first];
      if (bias.walk) s[n][e] += bias.walk[walk * kBiasStride + r - walk_first];
    }
  }
}
