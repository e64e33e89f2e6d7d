// collectives.hpp: the built-in variables, barriers, shuffles and votes of CUDA, on execution.hpp.
#pragma once
#include "execution.hpp"

#define threadIdx (::host_run::block->current->thread_idx)
#define blockIdx (::host_run::block->idx)
#define blockDim (::host_run::block->dim)
#define gridDim (::host_run::block->grid)
#define HOST_RUN_AT ::host_run::Site at = ::host_run::Site::here()

namespace host_run {
template <class T>
struct ShuffleArgument {
  T value, out;
  int source;
};
template <class T>
inline T shuffle(unsigned mask, T value, int source, Site site) {
  ShuffleArgument<T> argument{value, value, source};
  collective(mask, "__shfl_sync", &argument, site, [site](void** all, unsigned present) {
    for (unsigned rest = present; rest; rest &= rest - 1) {
      auto* a = static_cast<ShuffleArgument<T>*>(all[__builtin_ctz(rest)]);
      if (!(present >> a->source & 1))
        fail(site, "__shfl_sync reads lane %d, which is not in mask %08x", a->source, present);
      a->out = static_cast<ShuffleArgument<T>*>(all[a->source])->value;
    }
  });
  return argument.out;
}
struct VoteArgument {
  bool value;
  unsigned out;
};
// The lanes whose value is true.
inline unsigned ballot(unsigned mask, const char* what, bool value, Site site) {
  VoteArgument argument{value, 0};
  collective(mask, what, &argument, site, [](void** all, unsigned present) {
    unsigned votes = 0;
    for (unsigned rest = present; rest; rest &= rest - 1)
      votes |= unsigned(static_cast<VoteArgument*>(all[__builtin_ctz(rest)])->value)
               << __builtin_ctz(rest);
    for (unsigned rest = present; rest; rest &= rest - 1)
      static_cast<VoteArgument*>(all[__builtin_ctz(rest)])->out = votes;
  });
  return argument.out;
}
}  // namespace host_run

inline void __syncthreads(HOST_RUN_AT) { host_run::barrier(at); }
inline void __syncwarp(unsigned mask = ~0u, HOST_RUN_AT) {
  host_run::collective(mask, "__syncwarp", nullptr, at, [](void**, unsigned present) {
    host_run::Block& b = *host_run::block;
    const int warp = b.current->warp;
    const int lanes = min<int>(32, int(b.fibres.size()) - warp * 32);
    if (__builtin_popcount(present) == lanes) ++b.warps[warp].epoch;
  });
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, HOST_RUN_AT) {
  return host_run::shuffle(mask, value, source & 31, at);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance, HOST_RUN_AT) {
  return host_run::shuffle(mask, value, host_run::block->current->lane ^ distance, at);
}
inline unsigned __ballot_sync(unsigned mask, bool value, HOST_RUN_AT) {
  return host_run::ballot(mask, "__ballot_sync", value, at);
}
inline bool __any_sync(unsigned mask, bool value, HOST_RUN_AT) {
  return host_run::ballot(mask, "__any_sync", value, at) != 0;
}
#undef HOST_RUN_AT
