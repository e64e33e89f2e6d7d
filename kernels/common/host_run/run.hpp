// run.hpp: what run.cpp and racecheck.cpp share: the memory that kernels are given.
#pragma once
#include "execution.hpp"

namespace host_run {
// A buffer of `bytes` bytes from `start` on; its pages follow a protected one and are followed by
// one.
struct Buffer {
  unsigned char* start;
  size_t bytes;
};
// Global memory is one reserved range, so that an address says at once whether it is one.
constexpr size_t kGlobalBytes = size_t(1) << 30;
extern unsigned char* global_start;  // null before the first allocation
// The buffer whose pages hold `p`; null where there is none.
const Buffer* buffer_at(const void* p);
}  // namespace host_run
