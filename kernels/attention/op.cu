// Ragged flash attention, full, causal or windowed, forward and backward, on tensor cores (the
// maths is in mod.rs; Dao 2023). bf16 in, bf16 out, f32 inside; a block never computes a tile that
// nobody sees.
//
// Forward and the query side (dq) take a tile of queries and walk over keys; the key side (dk, dv)
// takes a tile of keys and walks over queries, everything transposed. Tiles are double-buffered:
// one barrier each. grid: (tiles of work, h)
#include "tile.cuh"

namespace {
// Tiles of the other side that a tile from `row` on meets: [first, end), `first` a multiple of
// kTile.
struct Range {
  int first, end;
};
__device__ __forceinline__ Range reach(const Attention& p, int row, int length, bool before,
                                       bool after) {
  const int window = min(p.window, length);
  const int first = before ? max(row - window, 0) : row;
  const int end = after ? min(row + kTile + window, length) : min(row + kTile, length);
  return {first / kTile * kTile, end};
}
__device__ __forceinline__ Range keys_of(const Attention& p, int row, int length) {
  return reach(p, row, length, true, !p.causal);
}
__device__ __forceinline__ Range queries_of(const Attention& p, int row, int length) {
  return reach(p, row, length, !p.causal, true);
}

// Shared memory: two buffers of each of two walking tiles, two tiles of the block's own, draws.
constexpr int kSharedBytes = 6 * kTileBytes + kDrawBytes + 4 * kTile * 4;
struct Shared {
  unsigned char *first, *second;  // walking tiles, buffer b at b·kTileBytes
  unsigned char *own, *own_too;
  uint32_t* draws;  // of this warp
  float* rows;      // key side: lse and delta of the walking rows, two buffers of 2·kTile
};
__device__ __forceinline__ Shared shared_of(unsigned char* at) {
  unsigned char* after = at + 6 * kTileBytes;
  return {at,
          at + 2 * kTileBytes,
          at + 4 * kTileBytes,
          at + 5 * kTileBytes,
          reinterpret_cast<uint32_t*>(after + threadIdx.x / 32 * (kDrawBytes / 4)),
          reinterpret_cast<float*>(after + kDrawBytes)};
}
// Starts copying rows `row`.. of two [length, stride] operands into buffer `buffer`.
__device__ __forceinline__ void walk_to(const Shared& s, const bf16* first, const bf16* second,
                                        int stride, int row, int length, int buffer) {
  const size_t at = size_t(row) * stride;
  load_rows<kTile>(s.first + buffer * kTileBytes, first + at, stride, length - row);
  load_rows<kTile>(s.second + buffer * kTileBytes, second + at, stride, length - row);
  copy_commit();
}

__device__ void forward(const Attention& p) {
  SHARED_DYNAMIC(memory);
  const Shared s = shared_of(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = place_of(p, int(blockIdx.x));
  const bf16 *k = p.k + at.head, *v = p.v + at.head;
  const Range keys = keys_of(p, at.row, at.length);
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const int valid = at.length - at.row, i0 = at.row + 16 * warp + lane / 4;
  load_rows<kTile>(s.own, p.q + tile, p.stride, valid);
  walk_to(s, k, v, p.stride, keys.first, at.length, 0);

  uint32_t q[4][4];
  float acc[8][4] = {};
  SoftmaxRows rows = {{-HUGE_VALF, -HUGE_VALF}, {0, 0}};
  for (int j0 = keys.first, buffer = 0; j0 < keys.end; j0 += kTile, buffer ^= 1) {
    copy_wait<0>();
    __syncthreads();  // this tile has landed for all, and all have left the other buffer
    if (j0 == keys.first) load_rows_a(q, s.own, 16 * warp, lane);
    if (j0 + kTile < keys.end) walk_to(s, k, v, p.stride, j0 + kTile, at.length, buffer ^ 1);
    float scores[8][4] = {};
    multiply_transposed(scores, q, s.first + buffer * kTileBytes, lane);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = i0 + 8 * (e >> 1), j = j0 + 8 * n + 2 * (lane % 4) + (e & 1);
        scores[n][e] = sees(p, i, j, at.length) ? scores[n][e] * (p.scale * kLog2E) : -HUGE_VALF;
      }
    online_softmax(scores, acc, rows);
    if (dropout.threshold)
      drop_tile(scores, dropout, p.samples[at.sequence], at.row + 16 * warp, j0, s.draws, lane);
    multiply(acc, scores, s.second + buffer * kTileBytes, lane);
  }
  float inverse[2];
  float* lse = p.lse + size_t(blockIdx.y) * p.tokens + at.begin + at.row;
  finish_softmax(inverse, rows, lse, valid, warp, lane);
  store_rows(p.o + tile, acc, inverse, p.stride, valid, warp, lane);
}

// dq and delta.
__device__ void backward_queries(const Attention& p) {
  SHARED_DYNAMIC(memory);
  const Shared s = shared_of(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = place_of(p, int(blockIdx.x));
  const bf16 *k = p.k + at.head, *v = p.v + at.head;
  const Range keys = keys_of(p, at.row, at.length);
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const size_t rows = size_t(blockIdx.y) * p.tokens + at.begin + at.row;
  const int valid = at.length - at.row, i0 = at.row + 16 * warp + lane / 4;
  load_rows<kTile>(s.own, p.q + tile, p.stride, valid);
  load_rows<kTile>(s.own_too, p.d_o + tile, p.stride, valid);
  walk_to(s, k, v, p.stride, keys.first, at.length, 0);

  uint32_t q[4][4], d_o[4][4];
  float dq[8][4] = {}, delta[2], lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    lse[half] = row < valid ? p.lse[rows + row] * kLog2E : HUGE_VALF;  // P is 0 in rows of nobody
  }
  for (int j0 = keys.first, buffer = 0; j0 < keys.end; j0 += kTile, buffer ^= 1) {
    copy_wait<0>();
    __syncthreads();  // this tile has landed for all, and all have left the other buffer
    if (j0 == keys.first) {
      load_rows_a(q, s.own, 16 * warp, lane);
      load_rows_a(d_o, s.own_too, 16 * warp, lane);
      row_delta(delta, p, d_o, tile, p.delta + rows, valid, warp, lane);
    }
    if (j0 + kTile < keys.end) walk_to(s, k, v, p.stride, j0 + kTile, at.length, buffer ^ 1);
    unsigned char* k_tile = s.first + buffer * kTileBytes;
    float g[8][4] = {}, d_p[8][4] = {};
    multiply_transposed(g, q, k_tile, lane);
    multiply_transposed(d_p, d_o, s.second + buffer * kTileBytes, lane);
    if (dropout.threshold)
      drop_tile(d_p, dropout, p.samples[at.sequence], at.row + 16 * warp, j0, s.draws, lane);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = i0 + 8 * (e >> 1), j = j0 + 8 * n + 2 * (lane % 4) + (e & 1);
        const float log2 = g[n][e] * (p.scale * kLog2E) - lse[e >> 1];
        const float probability = sees(p, i, j, at.length) ? exp2f(log2) : 0.f;
        g[n][e] = probability * (d_p[n][e] - delta[e >> 1]);
      }
    multiply(dq, g, k_tile, lane);
  }
  const float scale[2] = {p.scale, p.scale};
  store_rows(p.dq + tile, dq, scale, p.stride, valid, warp, lane);
}

// lse (in log2 units) and delta of the walking rows from `row` on; rows of nobody have P = 0.
__device__ __forceinline__ void stage_rows(float* to, const Attention& p, const Place& at,
                                           int row) {
  if (threadIdx.x >= kTile) return;
  const int i = row + int(threadIdx.x);
  const size_t from = size_t(blockIdx.y) * p.tokens + at.begin + i;
  to[threadIdx.x] = i < at.length ? p.lse[from] * kLog2E : HUGE_VALF;
  to[kTile + threadIdx.x] = i < at.length ? p.delta[from] : 0.f;
}

// dk and dv; after backward_queries, which leaves delta.
__device__ void backward_keys(const Attention& p) {
  SHARED_DYNAMIC(memory);
  const Shared s = shared_of(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = place_of(p, int(blockIdx.x));
  const bf16 *q = p.q + at.head, *d_o = p.d_o + at.head;
  const Range queries = queries_of(p, at.row, at.length);
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const int valid = at.length - at.row, j0 = at.row + 16 * warp + lane / 4;
  load_rows<kTile>(s.own, p.k + tile, p.stride, valid);
  load_rows<kTile>(s.own_too, p.v + tile, p.stride, valid);
  walk_to(s, q, d_o, p.stride, queries.first, at.length, 0);
  stage_rows(s.rows, p, at, queries.first);

  uint32_t k[4][4], v[4][4];
  float dk[8][4] = {}, dv[8][4] = {};
  for (int i0 = queries.first, buffer = 0; i0 < queries.end; i0 += kTile, buffer ^= 1) {
    copy_wait<0>();
    __syncthreads();  // this tile has landed for all, and all have left the other buffer
    if (i0 == queries.first)
      load_rows_a(k, s.own, 16 * warp, lane), load_rows_a(v, s.own_too, 16 * warp, lane);
    if (i0 + kTile < queries.end) {
      walk_to(s, q, d_o, p.stride, i0 + kTile, at.length, buffer ^ 1);
      stage_rows(s.rows + (buffer ^ 1) * 2 * kTile, p, at, i0 + kTile);
    }
    unsigned char *q_tile = s.first + buffer * kTileBytes,
                  *d_o_tile = s.second + buffer * kTileBytes;
    const float *lse = s.rows + buffer * 2 * kTile, *delta = lse + kTile;
    float probability[8][4] = {}, g[8][4] = {}, factor[8][4];
    multiply_transposed(probability, k, q_tile, lane);
    multiply_transposed(g, v, d_o_tile, lane);
    if (dropout.threshold)
      transposed_factors(factor, dropout, p.samples[at.sequence], i0, at.row + 16 * warp, s.draws,
                         lane);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * n + 2 * (lane % 4) + (e & 1), j = j0 + 8 * (e >> 1);
        const float log2 = probability[n][e] * (p.scale * kLog2E) - lse[column];
        const float all = sees(p, i0 + column, j, at.length) ? exp2f(log2) : 0.f;
        const float kept = dropout.threshold ? factor[n][e] : 1.f;
        g[n][e] = all * (g[n][e] * kept - delta[column]);
        probability[n][e] = all * kept;
      }
    multiply(dv, probability, d_o_tile, lane);
    multiply(dk, g, q_tile, lane);
  }
  const float scale[2] = {p.scale, p.scale}, one[2] = {1.f, 1.f};
  store_rows(p.dk + tile, dk, scale, p.stride, valid, warp, lane);
  store_rows(p.dv + tile, dv, one, p.stride, valid, warp, lane);
}
}  // namespace

static_assert(kSharedBytes == 58368, "launchers ask for it");
KERNEL(attention_forward, kAttentionThreads, Attention, forward)
KERNEL(attention_backward_queries, kAttentionThreads, Attention, backward_queries)
KERNEL(attention_backward_keys, kAttentionThreads, Attention, backward_keys)
