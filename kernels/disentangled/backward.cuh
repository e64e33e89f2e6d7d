// backward.cuh: the backward pass of disentangled attention, one side at a time.
//
// Queries own: dq and dPK, and delta for the other side. Keys own: dk, dv and dPQ, everything
// transposed. Either way, with P from the saved log-sum-exp and a tile's g = scale·P ∘ (drop'(dP) -
// D),
//   d_own += g·walk + G·table      d_table += Gᵀ·own      G[own, r] = Σ of g where rel[place] = r
// G is g skewed, a [64, run] matrix. A block adds what its tiles give a table to partial sums of
// its own, in order; sum_positions adds the blocks. It takes every gridDim.x-th tile of the work.
// Tiles are loaded and waited for: shared memory has no room for a second buffer.
#pragma once
#include "position.cuh"

constexpr int kGradStride =
    65;  // of staged g, f32: a lane's elements along a skew meet no conflict
constexpr int kBackwardBytes =
    3 * kTileBytes + 2 * kRunBytes + 2 * kBiasBytes + 2 * kRun * 2 + 2 * kTile * 4;

struct BackwardShared {
  unsigned char *own, *walk, *walk_too, *own_run, *walk_run, *skew;
  float *own_products, *walk_products, *columns;  // columns: lse and delta of walking queries
  int16_t *rel, *start;                           // start[r]: first place of the run's row r
};
__device__ __forceinline__ BackwardShared backward_shared(unsigned char* at) {
  unsigned char* run = at + 3 * kTileBytes;
  unsigned char* products = run + 2 * kRunBytes;
  unsigned char* rest = products + 2 * kBiasBytes;
  return {at,
          at + kTileBytes,
          at + 2 * kTileBytes,
          run,
          run + kRunBytes,
          products + kBiasBytes,  // once the scores are made, the walking products are free
          reinterpret_cast<float*>(products),
          reinterpret_cast<float*>(products + kBiasBytes),
          reinterpret_cast<float*>(rest),
          reinterpret_cast<int16_t*>(rest + 2 * kTile * 4),
          reinterpret_cast<int16_t*>(rest + 2 * kTile * 4) + kRun};
}
// G: 64 rows of 128 bf16, 16 chunks each.
__device__ __forceinline__ unsigned char* skew_chunk(unsigned char* skew, int row, int chunk) {
  return skew + row * 256 + ((chunk ^ (row & 7)) << 4);
}

// The four operands of a side: own·walk are the scores, own_too·walk_too the gradient of P.
struct Side {
  const bf16 *own, *own_too, *walk, *walk_too;
  const bf16 *own_table, *walk_table;
};
template <bool kKeysOwn>
__device__ __forceinline__ Side side_of(const Attention& p, const Positions& positions) {
  if (kKeysOwn) return {p.k, p.v, p.q, p.d_o, positions.pq, positions.pk};
  return {p.q, p.d_o, p.k, p.v, positions.pk, positions.pq};
}

// Loads a walking tile with its runs, and what is known of its places and rows; all have left the
// last.
template <bool kKeysOwn>
__device__ __forceinline__ Run load_walk(const BackwardShared& s, const Side& side,
                                         const Attention& p, const Positions& positions,
                                         const Place& at, int walk0) {
  const size_t from = at.head + size_t(walk0) * p.stride;
  const int difference = at.row - walk0;
  const Run run = run_of<kKeysOwn>(positions, difference, at.length);
  load_rows<kTile>(s.walk, side.walk + from, p.stride, at.length - walk0);
  load_rows<kTile>(s.walk_too, side.walk_too + from, p.stride, at.length - walk0);
  load_run<kKeysOwn>(s.own_run, side.own_table, positions, run);
  load_run<kKeysOwn>(s.walk_run, side.walk_table, positions, run);
  copy_commit();
  const int place = int(threadIdx.x);
  if (place < 127) {
    const int r = row_of_run<kKeysOwn>(positions, difference, place, at.length, run);
    s.rel[place] = int16_t(r);
    if (place == 0 || row_of_run<kKeysOwn>(positions, difference, place - 1, at.length, run) != r)
      s.start[r] = int16_t(place);
    if (place == 126) s.start[r + 1] = 127;
  }
  if (kKeysOwn && place < kTile) {
    const int i = walk0 + place;
    const size_t row = size_t(blockIdx.y) * p.tokens + at.begin + i;
    s.columns[place] = i < at.length ? p.lse[row] * kLog2E : HUGE_VALF;  // P is 0 in rows of nobody
    s.columns[kTile + place] = i < at.length ? p.delta[row] : 0.f;
  }
  copy_wait<0>();
  __syncthreads();
  return run;
}

// lse (log2 units) and delta of the own rows g and g + 8, where queries own.
struct OwnRows {
  float lse[2], delta[2];
};
__device__ __forceinline__ OwnRows own_rows(const Attention& p, const Place& at,
                                            const uint32_t (&d_o)[4][4], size_t tile, int warp,
                                            int lane) {
  OwnRows rows = {};
  const int valid = at.length - at.row;
  const size_t first = size_t(blockIdx.y) * p.tokens + at.begin + at.row;
  row_delta(rows.delta, p, d_o, tile, p.delta + first, valid, warp, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + lane / 4 + 8 * half;
    rows.lse[half] = row < valid ? p.lse[first + row] * kLog2E : HUGE_VALF;
  }
  return rows;
}

// From scores and dP: g, and the dropped probabilities (which only dv needs).
template <bool kKeysOwn>
__device__ __forceinline__ void gradients_of_scores(float (&g)[8][4], float (&probability)[8][4],
                                                    const Attention& p, const Place& at,
                                                    const OwnRows& rows, const BackwardShared& s,
                                                    int walk0, int warp, int lane) {
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  const int own0 = at.row + 16 * warp;
  auto* draws =
      reinterpret_cast<uint32_t*>(s.own_products + 16 * warp * kBiasStride);  // over its products
  float factor[8][4];
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) factor[n][e] = 1;
  if (dropout.threshold) {
    if (kKeysOwn)
      transposed_factors(factor, dropout, p.samples[at.sequence], walk0, own0, draws, lane);
    else
      drop_tile(factor, dropout, p.samples[at.sequence], own0, walk0, draws, lane);
  }
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * n + 2 * (lane % 4) + (e & 1), half = e >> 1;
      const bool present = own0 + lane / 4 + 8 * half < at.length && walk0 + column < at.length;
      const float lse = kKeysOwn ? s.columns[column] : rows.lse[half];
      const float delta = kKeysOwn ? s.columns[kTile + column] : rows.delta[half];
      const float all = present ? exp2f(probability[n][e] * (p.scale * kLog2E) - lse) : 0.f;
      g[n][e] = p.scale * all * (g[n][e] * factor[n][e] - delta);
      probability[n][e] = all * factor[n][e];
    }
}

// Writes g where it can be read along its skew, and clears this warp's rows of G.
__device__ __forceinline__ void stage(const BackwardShared& s, const float (&g)[8][4], int warp,
                                      int lane) {
  float* staged = s.own_products + 16 * warp * kBiasStride;
  __syncwarp();  // draws and products there have been read
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      staged[(lane / 4 + 8 * (e >> 1)) * kGradStride + 8 * n + 2 * (lane % 4) + (e & 1)] = g[n][e];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    vector_at<int4>(skew_chunk(s.skew, 16 * warp + (i * 32 + lane) / 16, lane % 16)) =
        make_int4(0, 0, 0, 0);
  __syncwarp();
}

// d_own += G·table for this warp's 16 rows, G made 16 columns at a time, and left in shared memory.
__device__ __forceinline__ void through_table(float (&d_own)[8][4], const BackwardShared& s,
                                              int warp, int lane) {
  const float* staged = s.own_products + 16 * warp * kBiasStride;
  const int first = s.rel[16 * warp], last = s.rel[16 * warp + 78];
  for (int k = 0; k <= (last - first) / 16; ++k) {
    float sum[4][2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4 + 8 * (i & 1),
                  r = first + 16 * k + 8 * (i >> 1) + 2 * (lane % 4) + e;
        const int corner = 16 * warp + row + 63;  // walk = corner - place
        if (r > last) continue;
        const int end = min(int(s.start[r + 1]), corner + 1);
        for (int place = max(int(s.start[r]), corner - 63); place < end; ++place)
          sum[i][e] += staged[row * kGradStride + corner - place];
        narrow(reinterpret_cast<bf16*>(skew_chunk(s.skew, 16 * warp + row, r / 8))[r % 8],
               sum[i][e]);
      }
    const uint32_t a[4] = {pack_bf16(sum[0][0], sum[0][1]), pack_bf16(sum[1][0], sum[1][1]),
                           pack_bf16(sum[2][0], sum[2][1]), pack_bf16(sum[3][0], sum[3][1])};
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      uint32_t b[4];
      load_b_rows(b, s.own_run, first + 16 * k, c, lane);
      multiply_add(d_own[c], a, b[0], b[1]);
      multiply_add(d_own[c + 1], a, b[2], b[3]);
    }
  }
}

// d_table += Gᵀ·own: the run's rows 32·warp to 32·warp + 31, 16 at a time to spare registers.
template <bool kKeysOwn>
__device__ __forceinline__ void into_table(float* partial, const BackwardShared& s, Run run,
                                           int warp, int lane) {
  for (int r0 = 32 * warp; r0 < 32 * warp + 32 && r0 < run.rows; r0 += 16) {
    float acc[8][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      const int row = 16 * k + (lane & 7) + ((lane >> 4) << 3);
      load_matrices_transposed(a, skew_chunk(s.skew, row, r0 / 8 + ((lane >> 3) & 1)));
#pragma unroll
      for (int c = 0; c < 8; c += 2) {
        uint32_t b[4];
        load_b_rows(b, s.own, 16 * k, c, lane);
        multiply_add(acc[c], a, b[0], b[1]);
        multiply_add(acc[c + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = r0 + lane / 4 + 8 * half;
      if (r >= run.rows) continue;
      float* row = partial + size_t(kKeysOwn ? run.base - r : run.base + r) * kHead;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float2& sum = vector_at<float2>(row + 8 * n + 2 * (lane % 4));
        sum = make_float2(sum.x + acc[n][2 * half], sum.y + acc[n][2 * half + 1]);
      }
    }
  }
}

// One tile of own rows: all walking tiles.
template <bool kKeysOwn>
__device__ __forceinline__ void backward_tile(const Attention& p, const Positions& positions,
                                              const BackwardShared& s, const Place& at,
                                              float* partial) {
  const Side side = side_of<kKeysOwn>(p, positions);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, valid = at.length - at.row;
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const Bias bias = {side.own_table ? s.own_products : nullptr,
                     side.walk_table ? s.walk_products : nullptr};
  __syncthreads();  // all have left the previous tile
  load_rows<kTile>(s.own, side.own + tile, p.stride, valid);
  load_rows<kTile>(s.walk, side.own_too + tile, p.stride, valid);  // passes through
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  uint32_t own[4][4], own_too[4][4];
  load_rows_a(own, s.own, 16 * warp, lane);
  load_rows_a(own_too, s.walk, 16 * warp, lane);
  OwnRows rows = {};
  if (!kKeysOwn) rows = own_rows(p, at, own_too, tile, warp, lane);

  float d_own[8][4] = {}, dv[8][4] = {};
  for (int walk0 = 0; walk0 < at.length; walk0 += kTile) {
    __syncthreads();  // all have left the previous walking tile
    const Run run = load_walk<kKeysOwn>(s, side, p, positions, at, walk0);
    if (bias.own) own_products(bias.own, own, s.own_run, s.rel, warp, lane);
    if (bias.walk) walk_products(bias.walk, s.walk, s.walk_run, s.rel, warp, lane);
    __syncthreads();  // products are complete
    float probability[8][4] = {}, g[8][4] = {};
    multiply_transposed(probability, own, s.walk, lane);
    add_positions(probability, bias, s.rel, warp, lane);
    multiply_transposed(g, own_too, s.walk_too, lane);
    __syncthreads();  // the walking products become G
    gradients_of_scores<kKeysOwn>(g, probability, p, at, rows, s, walk0, warp, lane);
    if (kKeysOwn) multiply(dv, probability, s.walk_too, lane);
    multiply(d_own, g, s.walk, lane);
    if (!side.own_table) continue;
    stage(s, g, warp, lane);
    through_table(d_own, s, warp, lane);
    if (!partial) continue;
    __syncthreads();  // G is complete
    into_table<kKeysOwn>(partial, s, run, warp, lane);
  }
  const float one[2] = {1.f, 1.f};
  store_rows((kKeysOwn ? p.dk : p.dq) + tile, d_own, one, p.stride, valid, warp, lane);
  if (kKeysOwn) store_rows(p.dv + tile, dv, one, p.stride, valid, warp, lane);
}

// grid: (parts, h); a block takes tiles blockIdx.x, + gridDim.x, ...
template <bool kKeysOwn>
__device__ void backward(const Attention& p, const Positions& positions) {
  SHARED_DYNAMIC(memory);
  const BackwardShared s = backward_shared(memory);
  float* partial = nullptr;
  if (positions.partials) {
    const int elements = positions.rows * kHead;
    partial = positions.partials + (size_t(blockIdx.x) * gridDim.y + blockIdx.y) * elements;
    for (int i = int(threadIdx.x); i < elements; i += kAttentionThreads) partial[i] = 0;
  }
  for (int work = int(blockIdx.x); work < positions.tiles; work += int(gridDim.x))
    backward_tile<kKeysOwn>(p, positions, s, place_of(p, work), partial);
}
