// AdamW over many buckets in one launch, and the clipping of its gradients without a word from the
// host (the maths is in mod.rs).
//
// Masters and state are f32; where a bucket has a bf16 copy that the model computes with, it is
// written with the master. Three launches make a step: squares (partial sums of squares), norm
// (their sum, the factor on the gradients and whether all is finite) and step, which leaves
// everything as it is from the first gradient on that is not finite. Buckets are cut into pieces of
// kPiece elements, one a block.
#include "../common/device.cuh"

namespace {
constexpr int kThreads = 256, kWarps = kThreads / 32, kPiece = 4096;

struct Bucket {
  float *values, *exp_avg, *exp_avg_sq, *gradients;
  bf16* copy;               // null where there is none
  int64_t length, decayed;  // the first `decayed` elements take weight decay
};
// The piece of a bucket that a block works on.
struct Piece {
  int bucket, index;
};
// What the norm says, written by the device for the device; the host may read it when it likes.
struct Norm {
  double norm;    // of the gradients over the number of samples
  double scale;   // on the gradients: one over that number times the clipping coefficient
  double finite;  // 0: there is a gradient that is not, or there was one in a step before; else 1
};
struct Squares {
  const Bucket* buckets;
  const Piece* pieces;
  double* partials;  // [pieces]
};
// The sum of squares of rows that are in no bucket.
struct SquaresRows {
  const float* values;
  double* partials;  // [blocks]
  int64_t length;
};
struct Clip {
  const double* partials;
  const Norm* before;  // of the step before, null in the first
  Norm* norm;
  int parts;
  float samples, max_norm;  // max_norm 0: no clipping
};
struct Constants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_bias2, epsilon, keep;
};
struct Step {
  const Bucket* buckets;
  const Piece* pieces;
  const Norm* norm;
  Constants constants;
};
// A table whose gradient is sparse rows, all of it decayed.
struct StepRows {
  float *values, *exp_avg, *exp_avg_sq;
  bf16* copy;
  const unsigned* ids;     // [rows], ascending
  const float* gradients;  // [rows, H]
  const Norm* norm;
  int table_rows, columns, rows;
  Constants constants;
};

__device__ __forceinline__ void sum_squares(const float* values, int64_t first, int64_t end,
                                            double* out) {
  SHARED_ARRAY(double, scratch, kWarps);
  float sum = 0;  // of at most kPiece / kThreads terms; f64 from there
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) sum += values[i] * values[i];
  const double total = block_sum<kWarps>(double(sum), scratch);
  if (threadIdx.x == 0) *out = total;
}

// grid: pieces
__device__ void squares(const Squares& p) {
  const Piece piece = p.pieces[blockIdx.x];
  const Bucket& bucket = p.buckets[piece.bucket];
  const int64_t first = int64_t(piece.index) * kPiece;
  sum_squares(bucket.gradients, first, min(first + kPiece, bucket.length), p.partials + blockIdx.x);
}

// grid: ceil(length / kPiece)
__device__ void squares_rows(const SquaresRows& p) {
  const int64_t first = int64_t(blockIdx.x) * kPiece;
  sum_squares(p.values, first, min(first + kPiece, p.length), p.partials + blockIdx.x);
}

// grid: 1
__device__ void clip(const Clip& p) {
  SHARED_ARRAY(double, scratch, kWarps);
  double sum = 0;
  for (int i = int(threadIdx.x); i < p.parts; i += kThreads) sum += p.partials[i];
  sum = block_sum<kWarps>(sum, scratch);
  if (threadIdx.x != 0) return;
  const double norm = sqrt(sum) / double(p.samples);
  const double coefficient = p.max_norm > 0.f ? double(p.max_norm) / (norm + 1e-6) : 1.0;
  p.norm->norm = norm;
  p.norm->scale = (coefficient < 1.0 ? coefficient : 1.0) / double(p.samples);
  // A step that did nothing left its gradients in place: none after it may go on with them.
  const bool before = !p.before || p.before->finite != 0.0;
  p.norm->finite = norm < double(HUGE_VALF) && before ? 1.0 : 0.0;  // 0 for NaN too
}

// One element; `keep` is 1 where nothing decays. Returns the new parameter.
__device__ __forceinline__ float update(const Constants& c, float keep, float value, float& m,
                                        float& v, float g) {
  m = c.beta1 * m + c.one_minus_beta1 * g;
  v = c.beta2 * v + c.one_minus_beta2 * g * g;
  return value * keep - c.step_size * m / (sqrtf(v) * c.inverse_bias2 + c.epsilon);
}

// grid: pieces
__device__ void step(const Step& p) {
  if (p.norm->finite == 0.0) return;
  const Piece piece = p.pieces[blockIdx.x];
  const Bucket bucket = p.buckets[piece.bucket];
  const float scale = float(p.norm->scale);
  const int64_t first = int64_t(piece.index) * kPiece, end = min(first + kPiece, bucket.length);
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    float m = bucket.exp_avg[i], v = bucket.exp_avg_sq[i];
    const float keep = i < bucket.decayed ? p.constants.keep : 1.f;
    const float value =
        update(p.constants, keep, bucket.values[i], m, v, bucket.gradients[i] * scale);
    bucket.values[i] = value, bucket.exp_avg[i] = m, bucket.exp_avg_sq[i] = v;
    bucket.gradients[i] = 0;
    if (bucket.copy) narrow(bucket.copy[i], value);
  }
}

// The place of `id` among ascending ids, or -1.
__device__ __forceinline__ int find(const unsigned* ids, int n, unsigned id) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ids[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low < n && ids[low] == id ? low : -1;
}

// A warp a row of the table. grid: ceil(table_rows / 8)
__device__ void step_rows(const StepRows& p) {
  if (p.norm->finite == 0.0) return;
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x / 32);
  if (row >= p.table_rows) return;
  const int at = find(p.ids, p.rows, unsigned(row));
  const float scale = float(p.norm->scale);
  for (int column = int(threadIdx.x % 32); column < p.columns; column += 32) {
    const size_t i = size_t(row) * p.columns + column;
    const float g = at < 0 ? 0.f : p.gradients[size_t(at) * p.columns + column] * scale;
    float m = p.exp_avg[i], v = p.exp_avg_sq[i];
    const float value = update(p.constants, p.constants.keep, p.values[i], m, v, g);
    p.values[i] = value, p.exp_avg[i] = m, p.exp_avg_sq[i] = v;
    if (p.copy) narrow(p.copy[i], value);
  }
}
}  // namespace

KERNEL(adamw_squares, kThreads, Squares, squares)
KERNEL(adamw_squares_rows, kThreads, SquaresRows, squares_rows)
KERNEL(adamw_clip, kThreads, Clip, clip)
KERNEL(adamw_step, kThreads, Step, step)
KERNEL(adamw_step_rows, kThreads, StepRows, step_rows)
