// Ragged disentangled flash attention, forward (the maths is in mod.rs; a tile's positions in
// position.cuh; backward in backward.cuh). bf16 in, bf16 out, f32 inside; nothing of [T, R] exists.
// grid: (tiles of work, h)
#include "backward.cuh"

namespace {
struct Parameters {
  Attention attention;
  Positions positions;
};

// K and V twice, PK and PQ runs, products of both, two rel.
constexpr int kForwardBytes = 4 * kTileBytes + 2 * kRunBytes + 2 * kBiasBytes + 2 * kRun * 2;
struct ForwardShared {
  unsigned char *k, *v, *pk, *pq;
  Bias bias;
  int16_t* rel;
};
__device__ __forceinline__ ForwardShared forward_shared(unsigned char* at, const Positions& p) {
  unsigned char* pk = at + 4 * kTileBytes;
  float* products = reinterpret_cast<float*>(pk + 2 * kRunBytes);
  return {at,
          at + 2 * kTileBytes,
          pk,
          pk + kRunBytes,
          {p.pk ? products : nullptr, p.pq ? products + kBiasBytes / 4 : nullptr},
          reinterpret_cast<int16_t*>(products + 2 * kBiasBytes / 4)};
}

// Per tile of keys: A, all has landed: products with the runs, to shared memory. B, they are
// complete and the runs are free: scores, softmax, values.
__device__ void forward(const Parameters& all) {
  SHARED_DYNAMIC(memory);
  const Attention& p = all.attention;
  const Positions& positions = all.positions;
  const ForwardShared s = forward_shared(memory, positions);
  // Where the own products go later: queries are in registers before those are first written.
  unsigned char* q_tile = s.pk + 2 * kRunBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = place_of(p, int(blockIdx.x));
  const bf16 *k = p.k + at.head, *v = p.v + at.head;
  const Dropout dropout = head_dropout(p.dropout, blockIdx.y);
  const size_t tile = at.head + size_t(at.row) * p.stride;
  const int valid = at.length - at.row;

  auto load_keys = [&](int j0, int buffer) {
    const size_t from = size_t(j0) * p.stride;
    load_rows<kTile>(s.k + buffer * kTileBytes, k + from, p.stride, at.length - j0);
    load_rows<kTile>(s.v + buffer * kTileBytes, v + from, p.stride, at.length - j0);
    copy_commit();
  };
  auto load_positions = [&](int j0) {
    const Run run = run_of<false>(positions, at.row - j0, at.length);
    load_run<false>(s.pk, positions.pk, positions, run);
    load_run<false>(s.pq, positions.pq, positions, run);
    copy_commit();
  };
  load_rows<kTile>(q_tile, p.q + tile, p.stride, valid);
  copy_commit();
  load_keys(0, 0);
  load_positions(0);
  copy_wait<2>();
  __syncthreads();
  uint32_t q[4][4];
  load_rows_a(q, q_tile, 16 * warp, lane);

  float acc[8][4] = {};
  SoftmaxRows rows = {{-HUGE_VALF, -HUGE_VALF}, {0, 0}};
  for (int j0 = 0, buffer = 0; j0 < at.length; j0 += kTile, buffer ^= 1) {
    int16_t* rel = s.rel + buffer * kRun;
    const Run run = run_of<false>(positions, at.row - j0, at.length);
    if (threadIdx.x < 127)
      rel[threadIdx.x] =
          int16_t(row_of_run<false>(positions, at.row - j0, int(threadIdx.x), at.length, run));
    copy_wait<0>();
    __syncthreads();  // A
    if (j0 + kTile < at.length) load_keys(j0 + kTile, buffer ^ 1);
    unsigned char* k_tile = s.k + buffer * kTileBytes;
    if (s.bias.own) own_products(s.bias.own, q, s.pk, rel, warp, lane);
    if (s.bias.walk) walk_products(s.bias.walk, k_tile, s.pq, rel, warp, lane);
    __syncthreads();  // B
    if (j0 + kTile < at.length) load_positions(j0 + kTile);
    float scores[8][4] = {};
    multiply_transposed(scores, q, k_tile, lane);
    add_positions(scores, s.bias, rel, warp, lane);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = j0 + 8 * n + 2 * (lane % 4) + (e & 1) < at.length;
        scores[n][e] = seen ? scores[n][e] * (p.scale * kLog2E) : -HUGE_VALF;
      }
    online_softmax(scores, acc, rows);
    if (dropout.threshold) {
      auto* draws =
          reinterpret_cast<uint32_t*>(q_tile + warp * 16 * kBiasStride * 4);  // over its products
      drop_tile(scores, dropout, p.samples[at.sequence], at.row + 16 * warp, j0, draws, lane);
    }
    multiply(acc, scores, s.v + buffer * kTileBytes, lane);
  }
  float inverse[2];
  float* lse = p.lse + size_t(blockIdx.y) * p.tokens + at.begin + at.row;
  finish_softmax(inverse, rows, lse, valid, warp, lane);
  store_rows(p.o + tile, acc, inverse, p.stride, valid, warp, lane);
}

__device__ void backward_queries(const Parameters& p) { backward<false>(p.attention, p.positions); }
__device__ void backward_keys(const Parameters& p) { backward<true>(p.attention, p.positions); }

// The second pass over a table's partial gradients.
struct SumPositions {
  const float* partials;  // [parts, h, R, 64]
  bf16* gradient;         // [R, 64h], written
  int parts, heads, rows;
};
constexpr int kSumThreads = 256;

// grid: ceil(R · 64h / 256)
__device__ void sum_positions(const SumPositions& p) {
  const int width = p.heads * kHead;
  const size_t i = size_t(blockIdx.x) * kSumThreads + threadIdx.x;
  const size_t row = i / width;
  const int head = int(i % width) / kHead, column = int(i % kHead);
  if (row >= size_t(p.rows)) return;
  float sum = 0;
  for (int part = 0; part < p.parts; ++part)
    sum += p.partials[((size_t(part) * p.heads + head) * p.rows + row) * kHead + column];
  narrow(p.gradient[i], sum);
}
}  // namespace

static_assert(kForwardBytes == 111104 && kBackwardBytes == 103424, "launchers ask for them");
KERNEL(disentangled_forward, kAttentionThreads, Parameters, forward)
KERNEL(disentangled_backward_queries, kAttentionThreads, Parameters, backward_queries)
KERNEL(disentangled_backward_keys, kAttentionThreads, Parameters, backward_keys)
KERNEL(disentangled_sum_positions, kSumThreads, SumPositions, sum_positions)
