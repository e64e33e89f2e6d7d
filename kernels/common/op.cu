// The second pass of every sum over rows: blocks leave partial sums, here they are added in order.
#include "device.cuh"

struct AddPartials {
  const float* partials;  // [parts, columns]
  float* gradient;        // [columns], added to
  int parts, columns;
};
constexpr int kAddPartialsThreads = 128;

// grid: ceil(columns / 128)
static __device__ void add_partials(const AddPartials& p) {
  const int column = int(blockIdx.x * kAddPartialsThreads + threadIdx.x);
  if (column >= p.columns) return;
  float sum = 0;
  for (int part = 0; part < p.parts; ++part) sum += p.partials[size_t(part) * p.columns + column];
  p.gradient[column] += sum;
}
KERNEL(add_partials_f32, kAddPartialsThreads, AddPartials, add_partials)
