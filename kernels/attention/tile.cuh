// tile.cuh: what the attention kernels share: 64-wide bf16 tiles in shared memory, fragments of
// them, the online softmax, dropout of a tile of probabilities.
//
// A block is 4 warps; a warp owns 16 rows of a 64 x 64 tile. A tile row is 64 bf16, 8 chunks of 16
// bytes; chunk c of row r lies at c ^ (r % 8), so that neither loads of matrices nor copies meet
// bank conflicts.
// Legend: i query, j key; g = lane/4 and t = lane%4 of an accumulator, whose element [n][2·half +
// e] is row g + 8·half, column 8n + 2t + e. Refuses heads of any size but 64.
#pragma once
#include "../common/tensor_core.cuh"

constexpr int kHead = 64, kTile = 64, kAttentionThreads = 128, kTileBytes = kTile * kHead * 2;
constexpr int kDrawBytes = kTile * kTile * 2;  // 16 bits for every element of a tile
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

// q, k, v, o and their gradients are [T, stride], head h at columns 64h; lse and delta f32 [h, T].
struct Attention {
  const bf16 *q, *k, *v;
  bf16* o;
  float* lse;
  const bf16* d_o;
  float* delta;  // Σ do·o of each row: what the query side leaves for the key side
  bf16 *dq, *dk, *dv;
  const int* cu_seqlens;
  const unsigned* samples;  // of each sequence
  const int2* work;         // (sequence, first row) of each tile; a block takes one, and a head
  int stride, tokens;
  int causal, window;  // window: as far as a query sees, at most
  float scale;
  Dropout dropout;
};

// Where a block works: tile `tile` of the work, at head blockIdx.y.
struct Place {
  int begin, length, row, sequence;  // of the sequence; `row` is the tile's first
  size_t head;                       // element of the sequence's first row at this head
};
__device__ __forceinline__ Place place_of(const Attention& p, int tile) {
  const int2 work = p.work[tile];
  const int begin = p.cu_seqlens[work.x];
  return {begin, p.cu_seqlens[work.x + 1] - begin, work.y, work.x,
          size_t(begin) * p.stride + blockIdx.y * kHead};
}
__device__ __forceinline__ bool sees(const Attention& p, int i, int j, int length) {
  return j < length && !(p.causal && j > i) && j - i <= p.window && i - j <= p.window;
}

// --------------------------------------------------------------------------------------------
// tiles
__device__ __forceinline__ unsigned char* chunk_at(unsigned char* tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}
// Rows 0 to valid - 1 from global memory, zeros up to kRows; the stride may be negative. Commit and
// wait are the caller's.
template <int kRows>
__device__ __forceinline__ void load_rows(unsigned char* tile, const bf16* from, int stride,
                                          int valid) {
  const int chunk = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    const int row = int(threadIdx.x / 8) + 16 * i;
    const bool present = row < valid;
    copy_async(chunk_at(tile, row, chunk),
               from + (present ? ptrdiff_t(row) * stride : 0) + chunk * 8, present);
  }
}
// A operand: rows `row` to row + 15, columns 16k to 16k + 15.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], unsigned char* tile, int row, int k,
                                       int lane) {
  load_matrices(a, chunk_at(tile, row + (lane & 15), 2 * k + (lane >> 4)));
}
// All 64 columns of 16 rows.
__device__ __forceinline__ void load_rows_a(uint32_t (&a)[4][4], unsigned char* tile, int row,
                                            int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_a(a[k], tile, row, k, lane);
}
// B operand of the tile's transpose: its rows n to n + 15 are two n-tiles, its columns 16k.. the
// depth.
__device__ __forceinline__ void load_b(uint32_t (&b)[4], unsigned char* tile, int n, int k,
                                       int lane) {
  load_matrices(b, chunk_at(tile, n + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
}
// B operand of the tile itself: its rows k to k + 15 are the depth, its columns 8c to 8c + 15 two
// n-tiles.
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], unsigned char* tile, int k, int c,
                                            int lane) {
  load_matrices_transposed(b, chunk_at(tile, k + (lane & 15), c + (lane >> 4)));
}

// acc[16 x 64] += a[16 x 64] tileᵀ
__device__ __forceinline__ void multiply_transposed(float (&acc)[8][4], const uint32_t (&a)[4][4],
                                                    unsigned char* tile, int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t b[4];
      load_b(b, tile, 8 * n, k, lane);
      multiply_add(acc[n], a[k], b[0], b[1]);
      multiply_add(acc[n + 1], a[k], b[2], b[3]);
    }
}
// acc[16 x 64] += bf16(p[16 x 64]) tile
__device__ __forceinline__ void multiply(float (&acc)[8][4], const float (&p)[8][4],
                                         unsigned char* tile, int lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t a[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                           pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]),
                           pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      uint32_t b[4];
      load_b_rows(b, tile, 16 * k, c, lane);
      multiply_add(acc[c], a, b[0], b[1]);
      multiply_add(acc[c + 1], a, b[2], b[3]);
    }
  }
}
// Writes this warp's 16 rows, times `factor`, as bf16; those below `valid`.
__device__ __forceinline__ void store_rows(bf16* to, const float (&acc)[8][4],
                                           const float (&factor)[2], int stride, int valid,
                                           int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    if (row >= valid) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      vector_at<uint32_t>(to + size_t(row) * stride + 8 * n + 2 * (lane % 4)) =
          pack_bf16(acc[n][2 * half] * factor[half], acc[n][2 * half + 1] * factor[half]);
  }
}

// ------------------------------------------------------------------------------------------
// softmax Running maximum (in log2 units) and this lane's share of the sum, of rows g and g + 8.
struct SoftmaxRows {
  float max[2], sum[2];
};
// s (log2 units, -inf where masked) becomes exp2(s - max); acc and the sums are rescaled.
__device__ __forceinline__ void online_softmax(float (&s)[8][4], float (&acc)[8][4],
                                               SoftmaxRows& rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = rows.max[half];
#pragma unroll
    for (int n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    // A row that has seen no key yet stays empty.
    const float base = top == -HUGE_VALF ? 0.f : top, shrink = exp2f(rows.max[half] - base);
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = exp2f(s[n][e] - base);
        sum += s[n][e];
        acc[n][e] *= shrink;
      }
    rows.sum[half] = rows.sum[half] * shrink + sum;
    rows.max[half] = top;
  }
}
// One over each row's sum, over its four lanes; writes the log-sum-exp of rows below `valid`.
__device__ __forceinline__ void finish_softmax(float (&inverse)[2], const SoftmaxRows& rows,
                                               float* lse, int valid, int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    inverse[half] = 1.f / sum;
    const int row = 16 * warp + lane / 4 + 8 * half;
    if (lane % 4 == 0 && row < valid) lse[row] = (rows.max[half] + log2f(sum)) * kLn2;
  }
}

// ------------------------------------------------------------------------------------------
// dropout
__device__ __forceinline__ Dropout head_dropout(const Dropout& d, unsigned head) {
  return {d.key_low, d.key_high ^ head << 8, d.step, d.threshold, d.scale};
}
// Multiplies a warp's p[16 queries from i][64 keys from j] by their factors. A Philox block decides
// 8 keys of one query: each lane makes 4 of the warp's 128, and they meet in `draws`, 2 KiB of the
// warp.
__device__ __forceinline__ void drop_tile(float (&p)[8][4], const Dropout& d, unsigned sample,
                                          int i, int j, uint32_t* draws_of_warp, int lane) {
  __syncwarp();  // all have read the tile before
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int row = (32 * m + lane) / 8, chunk = lane % 8;
    reinterpret_cast<uint4*>(draws_of_warp)[row * 8 + (chunk ^ (row & 7))] =
        draws(d, sample, unsigned(i + row), unsigned(j) / kChunk + unsigned(chunk));
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const uint32_t word = draws_of_warp[row * 32 + 4 * (n ^ (row & 7)) + lane % 4];
      p[n][2 * half] *= kept(d, word & 0xffffu);
      p[n][2 * half + 1] *= kept(d, word >> 16);
    }
}
// The factors of the transpose: 16 keys from j in rows, 64 queries from i in columns.
__device__ __forceinline__ void transposed_factors(float (&factor)[8][4], const Dropout& d,
                                                   unsigned sample, int i, int j,
                                                   uint32_t* draws_of_warp, int lane) {
  __syncwarp();
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int block = 32 * m + lane;  // query block/2, keys 8·(block%2)..
    reinterpret_cast<uint4*>(draws_of_warp)[block] =
        draws(d, sample, unsigned(i + block / 2), unsigned(j) / kChunk + unsigned(block % 2));
  }
  __syncwarp();
  const auto* draw = reinterpret_cast<const uint16_t*>(draws_of_warp);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      factor[n][e] =
          kept(d, draw[((8 * n + 2 * (lane % 4) + (e & 1)) * 2 + (e >> 1)) * 8 + lane / 4]);
}

// -----------------------------------------------------------------------------------------
// backward D of rows g and g + 8 of this warp, from do in fragments; written for the key side.
__device__ __forceinline__ void row_delta(float (&delta)[2], const Attention& p,
                                          const uint32_t (&d_o)[4][4], size_t tile, float* out,
                                          int valid, int warp, int lane) {
  delta[0] = delta[1] = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i & 1),
                column = 16 * k + 8 * (i >> 1) + 2 * (lane % 4);
      if (row >= valid) continue;
      const float2 a = unpack_bf16(d_o[k][i]);
      const float2 b =
          unpack_bf16(vector_at<uint32_t>(p.o + tile + size_t(row) * p.stride + column));
      delta[i & 1] += a.x * b.x + a.y * b.y;
    }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    delta[half] += __shfl_xor_sync(kAllLanes, delta[half], 1);
    delta[half] += __shfl_xor_sync(kAllLanes, delta[half], 2);
    const int row = 16 * warp + lane / 4 + 8 * half;
    if (lane % 4 == 0 && row < valid) out[row] = delta[half];
  }
}
