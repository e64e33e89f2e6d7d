// Embedding: a sum of table rows per token, and its gradient by segments (the maths is in mod.rs).
//
// Tables [V_k, H], y and dy [T, H]. For the gradient the launcher sorts the tokens by id and cuts
// each id's run into pieces: one pass sums the rows of each piece, a second the pieces of each id.
// What is summed where depends on the ids alone.
#include "../quantized/codes.cuh"

namespace {
constexpr int kTables = 4;  // words, positions, token types, virtual tokens

constexpr unsigned kNothing = 0xffffffff;  // the id of a token that takes no row

struct Forward {
  const void* tables[kTables];
  const float* scales[kTables];  // of a table of int8 codes: each row's largest magnitude; else null
  const unsigned* ids[kTables];  // [T] each
  int first_rows[kTables];       // of a table of int8 codes: where row 0 is
  void* y;
  int used, rows, columns;
};
struct Pieces {
  const void* dy;
  const unsigned* tokens;  // sorted by id
  const int* starts;       // [pieces + 1], into tokens
  float* sums;             // [pieces, H]
  int columns;
};
// Rows of one or two sparse gradients, brought together.
struct Join {
  const float *a, *b;  // [rows of each, H]
  const int2* from;    // [rows] of `out`: the rows of a and b that it sums; -1: none
  float* out;          // [rows, H], written
  int columns;
};
struct Rows {
  const float* sums;        // [pieces, H]
  const int* first_pieces;  // [rows + 1]
  const unsigned* ids;      // [rows], the row of `out` that each adds to; null: each is its own
  float* out;               // dense [V, H], added to; or, without ids, sparse [rows, H], written
  int columns;
};

// Columns `column` to `column + 7` of row `id` of a table.
template <class S>
__device__ __forceinline__ void load_row(float (&v)[kChunk], const Forward& p, int table,
                                         unsigned id, int column) {
  const float* scales = p.scales[table];
  if (!scales) {
    const S* rows = static_cast<const S*>(p.tables[table]);
    return load(v, rows + size_t(id) * p.columns, column, p.columns);
  }
  const size_t at = size_t(id) + p.first_rows[table];
  const float scale = scales[at] / kLargestCode;
  load_int8(v, p.tables[table], at * p.columns, column, p.columns);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) v[e] *= scale;
}

constexpr int kForwardThreads = 256;

// One thread a chunk. grid: ceil(T · ceil(H / 8) / 256)
template <class S>
__device__ void forward(const Forward& p) {
  const int chunks = ceil_div(p.columns, kChunk);
  const size_t i = size_t(blockIdx.x) * kForwardThreads + threadIdx.x;
  const size_t row = i / chunks;
  const int column = int(i % chunks) * kChunk;
  if (row >= size_t(p.rows)) return;
  float sum[kChunk] = {};
#pragma unroll
  for (int table = 0; table < kTables; ++table) {
    const unsigned id = table < p.used ? p.ids[table][row] : kNothing;
    if (id == kNothing) continue;
    float v[kChunk];
    load_row<S>(v, p, table, id, column);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum[e] += v[e];
  }
  store(static_cast<S*>(p.y) + row * p.columns, column, p.columns, sum);
}

// A block sums one strip of one piece. grid: (pieces, ceil(H / 256))
template <class S>
__device__ void pieces(const Pieces& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  const int strip = int(blockIdx.y) * kStrip, column = strip + int(threadIdx.x % 32) * kChunk;
  const int end = p.starts[blockIdx.x + 1];
  float sum[kChunk] = {};
  for (int i = p.starts[blockIdx.x] + int(threadIdx.x / 32); i < end && column < p.columns;
       i += kStripWarps) {
    float v[kChunk];
    load(v, static_cast<const S*>(p.dy) + size_t(p.tokens[i]) * p.columns, column, p.columns);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum[e] += v[e];
  }
  const float total = strip_sum(sum, scratch);
  const int own = strip + strip_column();
  if (own < p.columns) p.sums[size_t(blockIdx.x) * p.columns + own] = total;
}

constexpr int kRowsThreads = 128;

// grid: (rows, ceil(H / 128))
__device__ void rows(const Rows& p) {
  const int column = int(blockIdx.y * kRowsThreads + threadIdx.x);
  if (column >= p.columns) return;
  float sum = 0;
  for (int piece = p.first_pieces[blockIdx.x]; piece < p.first_pieces[blockIdx.x + 1]; ++piece)
    sum += p.sums[size_t(piece) * p.columns + column];
  if (p.ids)
    p.out[size_t(p.ids[blockIdx.x]) * p.columns + column] += sum;
  else
    p.out[size_t(blockIdx.x) * p.columns + column] = sum;
}

// grid: (rows, ceil(H / 128))
__device__ void join(const Join& p) {
  const int column = int(blockIdx.y * kRowsThreads + threadIdx.x);
  if (column >= p.columns) return;
  const int2 from = p.from[blockIdx.x];
  float sum = from.x < 0 ? 0.f : p.a[size_t(from.x) * p.columns + column];
  if (from.y >= 0) sum += p.b[size_t(from.y) * p.columns + column];
  p.out[size_t(blockIdx.x) * p.columns + column] = sum;
}
}  // namespace

KERNEL(embedding_forward_f32, kForwardThreads, Forward, forward<float>)
KERNEL(embedding_forward_bf16, kForwardThreads, Forward, forward<bf16>)
KERNEL(embedding_pieces_f32, kStrip, Pieces, pieces<float>)
KERNEL(embedding_pieces_bf16, kStrip, Pieces, pieces<bf16>)
KERNEL(embedding_rows_f32, kRowsThreads, Rows, rows)
KERNEL(embedding_join_f32, kRowsThreads, Join, join)
