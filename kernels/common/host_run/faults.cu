// faults.cu: kernels that are wrong in one way each, to test the tests; and one that is right and
// uses the language. Each runs as 64 threads.
#include "../tensor_core.cuh"

namespace {
struct Faulty {
  float* out;  // 65 elements
};
constexpr int kThreads = 64;

__device__ void no_barrier(const Faulty& p) {
  SHARED_ARRAY(float, row, kThreads);
  row[threadIdx.x] = 0;
  __syncthreads();
  row[threadIdx.x] = 1;
  p.out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}
__device__ void no_barrier_before_reuse(const Faulty& p) {
  SHARED_ARRAY(float, row, kThreads);
  row[threadIdx.x] = 1;
  __syncthreads();
  p.out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
  row[threadIdx.x] = 2;
}
__device__ void no_warp_barrier(const Faulty& p) {
  SHARED_ARRAY(float, row, kThreads);
  row[threadIdx.x] = 0;
  __syncthreads();
  row[threadIdx.x] = 1;
  p.out[threadIdx.x] = row[threadIdx.x ^ 1];
}
__device__ void never_written(const Faulty& p) {
  SHARED_ARRAY(float, row, kThreads + 1);
  row[threadIdx.x] = 1;
  __syncthreads();
  p.out[threadIdx.x] = row[threadIdx.x + 1];
}
__device__ void barrier_in_a_branch(const Faulty& p) {
  if (threadIdx.x < 32) __syncthreads();
  p.out[threadIdx.x] = 1;
}
__device__ void two_barriers(const Faulty& p) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  p.out[threadIdx.x] = 1;
}
__device__ void shuffle_in_a_branch(const Faulty& p) {
  if (threadIdx.x % 2) p.out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
}
__device__ void one_too_far(const Faulty& p) { p.out[threadIdx.x + 2] = 1; }
__device__ void far_away(const Faulty& p) { p.out[1 << 14] = 1; }
__device__ void two_blocks_write(const Faulty& p) {
  if (threadIdx.x == 0) p.out[0] = 1;
}
__device__ void unaligned(const Faulty& p) { vector_at<float2>(p.out + 1) = make_float2(1, 1); }
__device__ void copy_not_waited_for(const Faulty& p) {
  SHARED_DYNAMIC(shared);
  copy_async(shared + 16 * threadIdx.x, p.out, true);
  copy_commit();
}
__device__ void copy_used_too_early(const Faulty& p) {
  SHARED_DYNAMIC(shared);
  float* own = reinterpret_cast<float*>(shared + 16 * threadIdx.x);
  copy_async(own, p.out, false);
  copy_commit();
  const float early = own[0];
  copy_wait<0>();
  __syncthreads();
  p.out[threadIdx.x] = early;
}

struct Right {
  const float* in;  // 64 elements
  unsigned* out;    // 64 x 6
};
__device__ void right(const Right& p) {
  SHARED_ARRAY(float, row, kThreads);
  const int lane = threadIdx.x % 32;
  unsigned* out = p.out + 6 * threadIdx.x;
  row[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  out[0] = __shfl_sync(kAllLanes, threadIdx.x, 5);
  out[1] = __shfl_xor_sync(kAllLanes, threadIdx.x, 6);
  out[2] = __ballot_sync(kAllLanes, lane % 3 == 0);
  out[3] = lane < 16 ? __shfl_xor_sync(0xffffu, threadIdx.x, 1) : 7;
  out[4] = __any_sync(kAllLanes, threadIdx.x == 31);
  out[5] = pack_bf16(row[kThreads - 1 - threadIdx.x], row[threadIdx.x]);
}
}  // namespace

KERNEL(fault_no_barrier, kThreads, Faulty, no_barrier)
KERNEL(fault_no_barrier_before_reuse, kThreads, Faulty, no_barrier_before_reuse)
KERNEL(fault_no_warp_barrier, kThreads, Faulty, no_warp_barrier)
KERNEL(fault_never_written, kThreads, Faulty, never_written)
KERNEL(fault_barrier_in_a_branch, kThreads, Faulty, barrier_in_a_branch)
KERNEL(fault_two_barriers, kThreads, Faulty, two_barriers)
KERNEL(fault_shuffle_in_a_branch, kThreads, Faulty, shuffle_in_a_branch)
KERNEL(fault_one_too_far, kThreads, Faulty, one_too_far)
KERNEL(fault_far_away, kThreads, Faulty, far_away)
KERNEL(fault_two_blocks_write, kThreads, Faulty, two_blocks_write)
KERNEL(fault_unaligned, kThreads, Faulty, unaligned)
KERNEL(fault_copy_not_waited_for, kThreads, Faulty, copy_not_waited_for)
KERNEL(fault_copy_used_too_early, kThreads, Faulty, copy_used_too_early)
KERNEL(fault_none, kThreads, Right, right)
