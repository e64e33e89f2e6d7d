// Attention to keys that all sequences share, joined to attention that has left o and lse, on
// tensor cores (the maths is in mod.rs). bf16 in, bf16 out, f32 inside.
//
// Forward goes on where attention's online softmax ended: the maximum is lse, the sum 1, and what
// has been accumulated is o. Forward and the query side (dq) take a tile of queries and walk over
// the keys; the key side (dPK, dPV) takes a tile of keys and walks over queries, everything
// transposed. Most prefixes are one tile, so walking tiles are loaded and waited for.
#include "../attention/tile.cuh"

namespace {
struct Prefix {
  Attention attention;  // k and v are PK and PV; dq is added to, or null
  const bf16* own_o;    // what attention left, which forward reads
  const float* own_lse;
  float *d_keys, *d_values;  // partial sums [parts, n, stride]
  int keys, tiles;           // n, tiles of work
};

// Shared memory: two tiles of the block's own, two walking, draws, lse and delta of walking rows.
constexpr int kSharedBytes = 4 * kTileBytes + kDrawBytes + 2 * kTile * 4;
struct Shared {
  unsigned char *own, *own_too, *walk, *walk_too;
  uint32_t* draws;  // of this warp
  float* rows;
};
__device__ __forceinline__ Shared shared_of(unsigned char* at) {
  unsigned char* after = at + 4 * kTileBytes;
  return {at,
          at + kTileBytes,
          at + 2 * kTileBytes,
          at + 3 * kTileBytes,
          reinterpret_cast<uint32_t*>(after + threadIdx.x / 32 * (kDrawBytes / 4)),
          reinterpret_cast<float*>(after + kDrawBytes)};
}
// Loads PK and PV of this head from key j0 on, and waits.
__device__ __forceinline__ void load_keys(unsigned char* k_tile, unsigned char* v_tile,
                                          const Prefix& all, int j0) {
  const Attention& p = all.attention;
  const size_t from = size_t(j0) * p.stride + blockIdx.y * kHead;
  load_rows<kTile>(k_tile, p.k + from, p.stride, all.keys - j0);
  load_rows<kTile>(v_tile, p.v + from, p.stride, all.keys - j0);
  copy_commit();
  copy_wait<0>();
  __syncthreads();  // this tile has landed for all
}
// Element of a [T, stride] tensor where the pair n of a row of this warp's starts.
__device__ __forceinline__ size_t pair_at(size_t tile, int row, int stride, int n, int lane) {
  return tile + size_t(row) * stride + 8 * n + 2 * (lane % 4);
}

// The state that attention left its rows in; the sum is that of the first of a row's four lanes.
__device__ __forceinline__ void resume(float (&acc)[8][4], SoftmaxRows& rows, const Prefix& all,
                                       size_t tile, const float* lse, int valid, int warp,
                                       int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    rows.max[half] = row < valid ? lse[row] * kLog2E : 0.f;
    rows.sum[half] = lane % 4 == 0 ? 1.f : 0.f;
    if (row >= valid) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const size_t at = pair_at(tile, row, all.attention.stride, n, lane);
      const float2 pair = unpack_bf16(vector_at<uint32_t>(all.own_o + at));
      acc[n][2 * half] = pair.x, acc[n][2 * half + 1] = pair.y;
    }
  }
}

// grid: (tiles of work, h)
__device__ void forward(const Prefix& all) {
  SHARED_DYNAMIC(memory);
  const Attention& p = all.attention;
  const Shared s = shared_of(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = place_of(p, int(blockIdx.x));
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const size_t first = size_t(blockIdx.y) * p.tokens + at.begin + at.row;
  const int valid = at.length - at.row;
  load_rows<kTile>(s.own, p.q + tile, p.stride, valid);

  float acc[8][4] = {};
  SoftmaxRows rows;
  resume(acc, rows, all, tile, all.own_lse + first, valid, warp, lane);
  for (int j0 = 0; j0 < all.keys; j0 += kTile) {
    if (j0 > 0) __syncthreads();  // all have left the tile before
    load_keys(s.walk, s.walk_too, all, j0);
    uint32_t q[4][4];  // anew for every tile: kept, they would cost spills
    load_rows_a(q, s.own, 16 * warp, lane);
    float scores[8][4] = {};
    multiply_transposed(scores, q, s.walk, lane);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool present = j0 + 8 * n + 2 * (lane % 4) + (e & 1) < all.keys;
        scores[n][e] = present ? scores[n][e] * (p.scale * kLog2E) : -HUGE_VALF;
      }
    online_softmax(scores, acc, rows);
    if (dropout.threshold)
      drop_tile(scores, dropout, p.samples[at.sequence], at.row + 16 * warp, j0, s.draws, lane);
    multiply(acc, scores, s.walk_too, lane);
  }
  float inverse[2];
  finish_softmax(inverse, rows, p.lse + first, valid, warp, lane);
  store_rows(p.o + tile, acc, inverse, p.stride, valid, warp, lane);
}

// Adds this warp's 16 rows, times `factor`; those below `valid`.
__device__ __forceinline__ void add_rows(bf16* to, const float (&acc)[8][4], float factor,
                                         int stride, int valid, int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    if (row >= valid) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      uint32_t& pair = vector_at<uint32_t>(to + pair_at(0, row, stride, n, lane));
      const float2 before = unpack_bf16(pair);
      pair = pack_bf16(before.x + acc[n][2 * half] * factor,
                       before.y + acc[n][2 * half + 1] * factor);
    }
  }
}

// delta, and what is added to dq. grid: (tiles of work, h)
__device__ void backward_queries(const Prefix& all) {
  SHARED_DYNAMIC(memory);
  const Attention& p = all.attention;
  const Shared s = shared_of(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = place_of(p, int(blockIdx.x));
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const size_t first = size_t(blockIdx.y) * p.tokens + at.begin + at.row;
  const int valid = at.length - at.row;
  load_rows<kTile>(s.own, p.q + tile, p.stride, valid);
  load_rows<kTile>(s.own_too, p.d_o + tile, p.stride, valid);
  load_keys(s.walk, s.walk_too, all, 0);

  uint32_t q[4][4], d_o[4][4];
  float dq[8][4] = {}, delta[2], lse[2];
  load_rows_a(q, s.own, 16 * warp, lane);
  load_rows_a(d_o, s.own_too, 16 * warp, lane);
  row_delta(delta, p, d_o, tile, p.delta + first, valid, warp, lane);
  if (!p.dq) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    lse[half] = row < valid ? p.lse[first + row] * kLog2E : HUGE_VALF;  // P is 0 in rows of nobody
  }
  for (int j0 = 0; j0 < all.keys; j0 += kTile) {
    if (j0 > 0) {
      __syncthreads();  // all have left the tile before
      load_keys(s.walk, s.walk_too, all, j0);
    }
    float g[8][4] = {}, d_p[8][4] = {};
    multiply_transposed(g, q, s.walk, lane);
    multiply_transposed(d_p, d_o, s.walk_too, lane);
    if (dropout.threshold)
      drop_tile(d_p, dropout, p.samples[at.sequence], at.row + 16 * warp, j0, s.draws, lane);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool present = j0 + 8 * n + 2 * (lane % 4) + (e & 1) < all.keys;
        const float log2 = g[n][e] * (p.scale * kLog2E) - lse[e >> 1];
        g[n][e] = (present ? exp2f(log2) : 0.f) * (d_p[n][e] - delta[e >> 1]);
      }
    multiply(dq, g, s.walk, lane);
  }
  add_rows(p.dq + tile, dq, p.scale, p.stride, valid, warp, lane);
}

// Loads a tile of queries with what is known of its rows, and waits; rows of nobody have P = 0.
__device__ __forceinline__ void load_queries(const Shared& s, const Attention& p,
                                             const Place& at) {
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const int valid = at.length - at.row, row = int(threadIdx.x);
  load_rows<kTile>(s.walk, p.q + tile, p.stride, valid);
  load_rows<kTile>(s.walk_too, p.d_o + tile, p.stride, valid);
  copy_commit();
  if (row < kTile) {
    const size_t from = size_t(blockIdx.y) * p.tokens + at.begin + at.row + row;
    s.rows[row] = row < valid ? p.lse[from] * kLog2E : HUGE_VALF;
    s.rows[kTile + row] = row < valid ? p.delta[from] : 0.f;
  }
  copy_wait<0>();
  __syncthreads();  // this tile has landed for all
}

// Writes this warp's 16 rows of a partial sum, times `factor`; those below `valid`.
__device__ __forceinline__ void store_sums(float* to, const float (&acc)[8][4], float factor,
                                           int stride, int valid, int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    if (row >= valid) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      vector_at<float2>(to + pair_at(0, row, stride, n, lane)) =
          make_float2(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
  }
}

// A part's sums of dPK and dPV; after backward_queries, which leaves delta. A block takes tiles of
// queries blockIdx.x, + gridDim.x, ... grid: (parts, h, tiles of keys)
__device__ void backward_keys(const Prefix& all) {
  SHARED_DYNAMIC(memory);
  const Attention& p = all.attention;
  const Shared s = shared_of(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = int(blockIdx.z) * kTile;
  const int j0 = first + 16 * warp;
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  load_keys(s.own, s.own_too, all, first);

  float dk[8][4] = {}, dv[8][4] = {};
  for (int work = int(blockIdx.x); work < all.tiles; work += int(gridDim.x)) {
    const Place at = place_of(p, work);
    __syncthreads();  // all have left the tile before
    load_queries(s, p, at);
    float probability[8][4] = {}, g[8][4] = {}, factor[8][4];
    uint32_t own[4][4];  // anew for every tile: keys and values kept would cost spills
    load_rows_a(own, s.own, 16 * warp, lane);
    multiply_transposed(probability, own, s.walk, lane);
    load_rows_a(own, s.own_too, 16 * warp, lane);
    multiply_transposed(g, own, s.walk_too, lane);
    if (dropout.threshold)
      transposed_factors(factor, dropout, p.samples[at.sequence], at.row, j0, s.draws, lane);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * n + 2 * (lane % 4) + (e & 1);
        const bool present = j0 + lane / 4 + 8 * (e >> 1) < all.keys;
        const float log2 = probability[n][e] * (p.scale * kLog2E) - s.rows[column];
        const float whole = present ? exp2f(log2) : 0.f;
        const float kept = dropout.threshold ? factor[n][e] : 1.f;
        g[n][e] = whole * (g[n][e] * kept - s.rows[kTile + column]);
        probability[n][e] = whole * kept;
      }
    multiply(dv, probability, s.walk_too, lane);
    multiply(dk, g, s.walk, lane);
  }
  const size_t to = (size_t(blockIdx.x) * all.keys + first) * p.stride + blockIdx.y * kHead;
  store_sums(all.d_keys + to, dk, p.scale, p.stride, all.keys - first, warp, lane);
  store_sums(all.d_values + to, dv, 1.f, p.stride, all.keys - first, warp, lane);
}
}  // namespace

static_assert(kSharedBytes == 41472, "launchers ask for it");
KERNEL(prefix_forward, kAttentionThreads, Prefix, forward)
KERNEL(prefix_backward_queries, kAttentionThreads, Prefix, backward_queries)
KERNEL(prefix_backward_keys, kAttentionThreads, Prefix, backward_keys)
