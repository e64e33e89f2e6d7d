// tensor_core.hpp: the host versions of tensor_core.cuh. Fragments are laid out as the PTX ISA
// says; timing is stricter than any device's: an asynchronous copy makes its target NaN when it is
// issued and happens when it is waited for.
#pragma once
#include "collectives.hpp"

#define HOST_RUN_AT ::host_run::Site at = ::host_run::Site::here()

inline void copy_async(void* to, const void* from, bool valid, HOST_RUN_AT) {
  using namespace host_run;
  Fibre& f = *block->current;
  f.site = at;
  if (uintptr_t(to) % 16 || (valid && uintptr_t(from) % 16))
    fail(at, "copy_async: %p or %p is not aligned to 16 bytes", to, from);
  if (!in_shared(to, 16)) fail(at, "copy_async: the target is not in this block's shared memory");
  note_access(to, 16, true);
  std::memset(to, kPoison, 16);  // it may land at any time from now on
  f.copies.push_back({to, from, valid, f.next_group});
}
inline void copy_commit() { ++host_run::block->current->next_group; }
template <int kLeave>
inline void copy_wait() {
  using namespace host_run;
  Fibre& f = *block->current;
  size_t kept = 0;
  for (const Copy& copy : f.copies) {
    if (copy.group + kLeave >= f.next_group) {
      f.copies[kept++] = copy;
      continue;
    }
    note_access(copy.to, 16, true);
    if (copy.valid) {
      note_access(copy.from, 16, false);
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  f.copies.resize(kept);
}

namespace host_run {
struct MatricesArgument {
  uint32_t* r;
  const void* row;
};
inline void matrices(uint32_t (&r)[4], const void* row, bool transposed, Site at) {
  if (uintptr_t(row) % 16) fail(at, "load_matrices: row %p is not aligned to 16 bytes", row);
  if (!in_shared(row, 16)) fail(at, "load_matrices: the row is not in this block's shared memory");
  block->current->site = at;
  note_access(row, 16, false);
  MatricesArgument argument{r, row};
  const char* what = transposed ? "load_matrices_transposed" : "load_matrices";
  collective(~0u, what, &argument, at, [transposed](void** all, unsigned) {
    uint16_t m[4][8][8];
    for (int l = 0; l < 32; ++l)
      std::memcpy(m[l / 8][l % 8], static_cast<MatricesArgument*>(all[l])->row, 16);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int g = l / 4, c = 2 * (l % 4);
        const uint16_t low = transposed ? m[i][c][g] : m[i][g][c];
        const uint16_t high = transposed ? m[i][c + 1][g] : m[i][g][c + 1];
        static_cast<MatricesArgument*>(all[l])->r[i] = uint32_t(high) << 16 | low;
      }
  });
}

struct ProductArgument {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};
inline float low_half(uint32_t v) { return __uint_as_float(v << 16); }
inline float high_half(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
inline void product(void** all) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; ++l) {
    const ProductArgument& x = *static_cast<ProductArgument*>(all[l]);
    const int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1), column = t + 8 * (i >> 1);
      a[row][column] = low_half(x.a[i]), a[row][column + 1] = high_half(x.a[i]);
      d[g + 8 * (i >> 1)][t + (i & 1)] = x.d[i];
    }
    b[t][g] = low_half(x.b0), b[t + 1][g] = high_half(x.b0);
    b[t + 8][g] = low_half(x.b1), b[t + 9][g] = high_half(x.b1);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[i][n] += a[i][k] * b[k][n];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i)
      static_cast<ProductArgument*>(all[l])->d[i] = d[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
}
}  // namespace host_run

inline void load_matrices(uint32_t (&r)[4], const void* row, HOST_RUN_AT) {
  host_run::matrices(r, row, false, at);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, HOST_RUN_AT) {
  host_run::matrices(r, row, true, at);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         HOST_RUN_AT) {
  host_run::ProductArgument argument{d, a, b0, b1};
  host_run::collective(~0u, "multiply_add", &argument, at,
                       [](void** all, unsigned) { host_run::product(all); });
}
#undef HOST_RUN_AT
