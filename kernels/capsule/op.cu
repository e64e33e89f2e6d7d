// Capsules by dynamic routing, forward and backward (the maths is in mod.rs).
//
// u, du [T, J·D]; v, dv [B, J·D]; sums f32 [B, R, J·D]; cu_seqlens [B + 1]. A block takes a sequence: what a
// row's capsule needs is a thread's, what a row's softmax needs a thread's, what is summed over rows a
// strip's, with a barrier between. Rows' numbers are in global memory, the sequence's in shared memory.
#include "../common/device.cuh"

namespace {
constexpr int kThreads = kStrip;

struct Routing {
  int capsules, size, iterations;  // J, D, R
  __device__ __forceinline__ int columns() const { return capsules * size; }
};
struct Forward {
  const void* u;
  void* v;
  float *sums, *couplings;  // couplings: [T, J], to work in
  const int* cu_seqlens;
  Routing routing;
};
struct Backward {
  const void *u, *dv;
  const float* sums;
  void* du;
  // To work in, of iterations 1 to R - 1: c and the gradients of b [R - 1, T, J]. Of all: [B, R, 2, J·D],
  // ds and the v of the iteration before.
  float *couplings, *logits, *vectors;
  const int* cu_seqlens;
  Routing routing;
  int rows;  // T
};

// The products of each vote with its capsule's columns of `with`.
template <class S>
__device__ __forceinline__ void agree(float* to, const S* u, const float* with, int rows,
                                      const Routing& r) {
  for (int i = int(threadIdx.x); i < rows * r.capsules; i += kThreads) {
    const S* vote = u + size_t(i) * r.size;
    const float* other = with + i % r.capsules * r.size;
    float sum = 0;
#pragma unroll 1  // few, and several at once spill registers in backward
    for (int column = 0; column < r.size; column += kChunk) {
      float v[kChunk];
      load(v, vote, column, r.size);
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        if (column + e < r.size) sum += v[e] * other[column + e];
    }
    to[i] = sum;
  }
}

// c of a row from its b. A NaN is no maximum, but makes the sum NaN.
__device__ __forceinline__ void softmax(float* row, int capsules) {
  float most = row[0], sum = 0;
  for (int j = 1; j < capsules; ++j) most = fmaxf(most, row[j]);
  for (int j = 0; j < capsules; ++j) sum += row[j] = expf(row[j] - most);
  for (int j = 0; j < capsules; ++j) row[j] /= sum;
}

// The capsule of each column of a chunk; past the last column the last, which is there to be read.
__device__ __forceinline__ void capsules_of(int (&capsule)[kChunk], int column, const Routing& r) {
#pragma unroll
  for (int e = 0; e < kChunk; ++e) capsule[e] = min((column + e) / r.size, r.capsules - 1);
}

// Sums of the votes over the rows, each times its `weights`. Ends with a barrier.
template <class S>
__device__ __forceinline__ void sum_rows(float* sums, const S* u, const float* weights, int rows,
                                         const Routing& r, float* scratch) {
  const int columns = r.columns();
  for (int strip = 0; strip < columns; strip += kStrip) {
    const int column = strip + int(threadIdx.x % 32) * kChunk;
    int capsule[kChunk];
    capsules_of(capsule, column, r);
    float sum[kChunk] = {};
    for (int row = int(threadIdx.x / 32); row < rows && column < columns; row += kStripWarps) {
      float v[kChunk];
      load(v, u + size_t(row) * columns, column, columns);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[e] += weights[row * r.capsules + capsule[e]] * v[e];
    }
    const float total = strip_sum(sum, scratch);
    const int own = strip + strip_column();
    if (own < columns) sums[own] = total;
  }
  __syncthreads();
}

// The product of two vectors over the capsule of a column.
__device__ __forceinline__ float capsule_dot(const float* a, const float* b, int column, int size) {
  const int first = column - column % size;
  float sum = 0;
  for (int d = first; d < first + size; ++d) sum += a[d] * b[d];
  return sum;
}
__device__ __forceinline__ float squash(const float* s, int column, int size) {
  const float square = capsule_dot(s, s, column, size);
  return sqrtf(square) / (1.f + square) * s[column];
}
// Where s is zero squash is flat. Not `square > 0`, which would hide a NaN.
__device__ __forceinline__ float squash_backward(const float* s, const float* dv, int column,
                                                 int size) {
  const float square = capsule_dot(s, s, column, size), along = capsule_dot(s, dv, column, size);
  const float length = sqrtf(square), inverse = 1.f / (1.f + square);
  const float slope = square == 0 ? 0.f : (1.f - square) * inverse * inverse * along / length;
  return length * inverse * dv[column] + slope * s[column];
}

// grid: B
template <class S>
__device__ void forward(const Forward& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  SHARED_DYNAMIC(dynamic);
  const Routing& r = p.routing;
  const int begin = p.cu_seqlens[blockIdx.x], rows = p.cu_seqlens[blockIdx.x + 1] - begin;
  const int columns = r.columns();
  float *found = reinterpret_cast<float*>(dynamic), *s = found + columns;
  const S* u = static_cast<const S*>(p.u) + size_t(begin) * columns;
  float* c = p.couplings + size_t(begin) * r.capsules;
  for (int k = int(threadIdx.x); k < columns; k += kThreads) found[k] = 0;
  __syncthreads();
  for (int iteration = 0; iteration < r.iterations; ++iteration) {
    agree(c, u, found, rows, r);  // b is the votes times all v so far
    __syncthreads();              // a row's b are there
    for (int row = int(threadIdx.x); row < rows; row += kThreads)
      softmax(c + row * r.capsules, r.capsules);
    __syncthreads();  // all c are there
    sum_rows(s, u, c, rows, r, scratch);
    const size_t to = size_t(blockIdx.x) * r.iterations + iteration;
    for (int k = int(threadIdx.x); k < columns; k += kThreads) {
      const float v = squash(s, k, r.size);
      p.sums[to * columns + k] = s[k];
      found[k] += v;
      if (iteration == r.iterations - 1)
        narrow(static_cast<S*>(p.v)[size_t(blockIdx.x) * columns + k], v);
    }
    __syncthreads();  // before s is written again
  }
}

// Where a sequence's rows and vectors are, of one iteration.
struct Work {
  float *couplings, *logits, *ds, *before;
};
__device__ __forceinline__ Work work_of(const Backward& p, int begin, int iteration) {
  const Routing& r = p.routing;
  const size_t rows = (size_t(iteration - 1) * p.rows + begin) * r.capsules;
  float* vectors =
      p.vectors + (size_t(blockIdx.x) * r.iterations + iteration) * 2 * r.columns();
  if (iteration == 0) return {nullptr, nullptr, vectors, vectors + r.columns()};
  return {p.couplings + rows, p.logits + rows, vectors, vectors + r.columns()};
}

// du, from the work of all iterations.
template <class S>
__device__ __forceinline__ void spread(const Backward& p, int begin, int rows) {
  const Routing& r = p.routing;
  const int columns = r.columns();
  const float uniform = 1.f / float(r.capsules);
  for (int column = int(threadIdx.x % 32) * kChunk; column < columns; column += kStrip) {
    int capsule[kChunk];
    capsules_of(capsule, column, r);
    for (int row = int(threadIdx.x / 32); row < rows; row += kStripWarps) {
      float sum[kChunk] = {};
      for (int iteration = 0; iteration < r.iterations; ++iteration) {
        const Work work = work_of(p, begin, iteration);
        float ds[kChunk], before[kChunk];
        load(ds, work.ds, column, columns);
        load(before, work.before, column, columns);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          const int at = row * r.capsules + capsule[e];
          if (iteration == 0)
            sum[e] += uniform * ds[e];
          else
            sum[e] += work.couplings[at] * ds[e] + work.logits[at] * before[e];
        }
      }
      store(static_cast<S*>(p.du) + size_t(begin + row) * columns, column, columns, sum);
    }
  }
}

// grid: B
template <class S>
__device__ void backward(const Backward& p) {
  SHARED_ARRAY(float, scratch, kStripScratch);
  SHARED_DYNAMIC(dynamic);
  const Routing& r = p.routing;
  const int begin = p.cu_seqlens[blockIdx.x], rows = p.cu_seqlens[blockIdx.x + 1] - begin;
  const int columns = r.columns();
  float *found = reinterpret_cast<float*>(dynamic), *dv = found + columns, *ds = dv + columns;
  const S* u = static_cast<const S*>(p.u) + size_t(begin) * columns;
  const float* sums = p.sums + size_t(blockIdx.x) * r.iterations * columns;
  for (int k = int(threadIdx.x); k < columns; k += kThreads)
    dv[k] = widen(static_cast<const S*>(p.dv)[size_t(blockIdx.x) * columns + k]);
  __syncthreads();
  for (int iteration = r.iterations - 1; iteration >= 0; --iteration) {
    const Work work = work_of(p, begin, iteration);
    for (int k = int(threadIdx.x); k < columns; k += kThreads) {
      float before = 0, sum = 0;
#pragma unroll 1  // few, and several at once spill registers
      for (int i = 0; i < iteration; ++i)
        sum += before = squash(sums + size_t(i) * columns, k, r.size);
      found[k] = sum;
      work.before[k] = before;
      work.ds[k] = ds[k] = squash_backward(sums + size_t(iteration) * columns, dv, k, r.size);
    }
    __syncthreads();            // ds and the sum of v are there
    if (iteration == 0) break;  // its b are no variables
    agree(work.couplings, u, found, rows, r);
    agree(work.logits, u, ds, rows, r);
    __syncthreads();  // a row's b and dc are there
    const bool last = iteration == r.iterations - 1;
    const float* later = last ? nullptr : work_of(p, begin, iteration + 1).logits;
    for (int row = int(threadIdx.x); row < rows; row += kThreads) {
      float *c = work.couplings + row * r.capsules, *db = work.logits + row * r.capsules, mean = 0;
      softmax(c, r.capsules);
      for (int j = 0; j < r.capsules; ++j) mean += c[j] * db[j];
      for (int j = 0; j < r.capsules; ++j)
        db[j] = c[j] * (db[j] - mean) + (later ? later[row * r.capsules + j] : 0.f);
    }
    __syncthreads();  // all db are there
    sum_rows(dv, u, work.logits, rows, r, scratch);
  }
  spread<S>(p, begin, rows);
}
}  // namespace

KERNEL(capsule_forward_f32, kThreads, Forward, forward<float>)
KERNEL(capsule_forward_bf16, kThreads, Forward, forward<bf16>)
KERNEL(capsule_backward_f32, kThreads, Backward, backward<float>)
KERNEL(capsule_backward_bf16, kThreads, Backward, backward<bf16>)
