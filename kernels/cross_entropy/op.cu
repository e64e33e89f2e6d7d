// Softmax cross-entropy with label smoothing (the maths is in mod.rs): loss and prediction of each
// row and the gradient of the logits, then the sums of loss and hits in f64.
//
// logits, d_logits [B, C]; labels [B], below C; losses f32 and predictions [B]; totals f64 [2],
// loss and hits, are added to: a step's micro-batches leave one pair, to be read a step later.
#include "../common/device.cuh"

namespace {
struct CrossEntropy {
  const void* logits;
  const unsigned* labels;
  void* d_logits;
  float* losses;
  unsigned* predictions;  // argmax
  int rows, classes;
  float smoothing;
};
struct Totals {
  const float* losses;
  const unsigned *predictions, *labels;
  double* totals;
  int rows;
};

constexpr int kThreads = 128, kWarps = kThreads / 32;

// The largest logit and the first class that has it, over the warp. A NaN is never larger.
struct Best {
  float value;
  int at;
};
__device__ __forceinline__ Best warp_best(Best own) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    const Best other = {__shfl_xor_sync(kAllLanes, own.value, distance),
                        __shfl_xor_sync(kAllLanes, own.at, distance)};
    if (other.value > own.value || (other.value == own.value && other.at < own.at)) own = other;
  }
  return own;
}

// A warp a row. grid: ceil(B / 4)
template <class S>
__device__ void cross_entropy(const CrossEntropy& p) {
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  const S* logits = static_cast<const S*>(p.logits) + size_t(row) * p.classes;
  S* d_logits = static_cast<S*>(p.d_logits) + size_t(row) * p.classes;
  const int label = int(p.labels[row]);
  Best best = {widen(logits[0]), 0};
  for (int c = lane; c < p.classes; c += 32) {
    const float x = widen(logits[c]);
    if (x > best.value) best = {x, c};
  }
  best = warp_best(best);
  // Below the maximum, so that large logits lose nothing: nll = log Σ e^(x - max) - (x_label -
  // max).
  float exps = 0, sum = 0;
  for (int c = lane; c < p.classes; c += 32) {
    const float x = widen(logits[c]) - best.value;
    exps += expf(x);
    sum += x;
  }
  exps = warp_sum(exps), sum = warp_sum(sum);
  const float lse = logf(exps), uniform = p.smoothing / float(p.classes);
  for (int c = lane; c < p.classes; c += 32) {
    const float target = uniform + (c == label ? 1.f - p.smoothing : 0.f);
    narrow(d_logits[c], expf(widen(logits[c]) - best.value - lse) - target);
  }
  if (lane == 0) {
    const float nll = lse - (widen(logits[label]) - best.value);
    p.losses[row] = (1.f - p.smoothing) * nll + p.smoothing * (lse - sum / float(p.classes));
    p.predictions[row] = unsigned(best.at);
  }
}

// One block, so that the order of the sum is the rows'. grid: 1
__device__ void totals(const Totals& p) {
  SHARED_ARRAY(double, scratch, kWarps);
  double loss = 0, hits = 0;
  for (int row = int(threadIdx.x); row < p.rows; row += kThreads)
    loss += p.losses[row], hits += p.predictions[row] == p.labels[row];
  loss = block_sum<kWarps>(loss, scratch);
  hits = block_sum<kWarps>(hits, scratch);
  if (threadIdx.x == 0) p.totals[0] += loss, p.totals[1] += hits;
}
}  // namespace

KERNEL(cross_entropy_f32, kThreads, CrossEntropy, cross_entropy<float>)
KERNEL(cross_entropy_bf16, kThreads, CrossEntropy, cross_entropy<bf16>)
KERNEL(cross_entropy_totals, kThreads, Totals, totals)
