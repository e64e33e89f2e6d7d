// execution.hpp: how a kernel runs on the host. A launch runs its blocks one after another; a
// block's threads are fibres that take turns, and change over at barriers and warp collectives
// only.
//
// Owns the scheduler, barriers, warp collectives, shared memory, and the checks a GPU does not
// make:
//   * a barrier that not every thread reaches, or that threads reach at different lines
//   * a warp collective with a lane missing, a wrong mask or another operation; a deadlock
//   * shared memory is NaN when a block starts; its end lies against a protected page
// Races, uninitialised reads and exact bounds are racecheck.cpp's, at every access to memory.
// Refuses textures, clusters, TMA, cooperative groups, launches from the device, blocks that wait
// for one another, and timing.
//
// A failed check leaves the launch at once and is what the launch returns.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "fibre.hpp"
#include "language.hpp"

namespace host_run {

// As a default argument, here() is where the caller stands.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
inline bool same(Site a, Site b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

// One cp.async of 16 bytes that has not been waited for.
struct Copy {
  void* to;
  const void* from;
  bool valid;
  unsigned group;
};
// One thread.
struct Fibre {
  Context context;
  uint3 thread_idx;
  int id, lane, warp;
  const char* waits_for;  // null while it can run
  bool at_barrier;
  bool done;
  Site site;  // of its last barrier or collective
  std::vector<Copy> copies;
  unsigned next_group;
};
struct Collective {
  unsigned mask, arrived;
  const char* what;
  void* argument[32];
};
struct Warp {
  unsigned ready;          // lanes that can run
  unsigned epoch;          // counts __syncwarp of all lanes: what orders memory inside a warp
  Collective pending[32];  // one per mask in use: half a warp may be ahead of the other
};
struct Barrier {
  int waiting;
  Site site;
};

constexpr size_t kStackBytes = 256 << 10, kPage = 4096;
constexpr size_t kSharedBytes = 227 << 10;  // what a block may have on sm_90 (sm_80: 163 KiB)
constexpr size_t kArenaBytes = 288 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN as float and bf16, -1 as an integer

// The block that runs, and what outlives it: stacks, the arena, the counters of racecheck.cpp.
struct Block {
  dim3 grid, dim;
  uint3 idx;
  void (*kernel)(const void*);
  const void* parameters;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Barrier barrier;
  Fibre* current;
  Context home;
  int alive;
  unsigned serial, launch_serial;  // of this block, and of the first of its launch; never repeat
  unsigned epoch;                  // counts __syncthreads and block starts
  uint64_t order, random;
  // Shared memory: static arrays grow from the front, the dynamic part ends at the protected page.
  unsigned char *arena, *dynamic;
  size_t dynamic_bytes, static_bytes;
  struct Static {
    const void* key;
    unsigned char* at;
  };
  std::vector<Static> statics;
  std::vector<char*> stacks;
  char failure[512];  // empty while all is well
};
// The one block that runs; null outside launches, which a lock keeps apart.
inline Block* block = nullptr;

// Ends the launch, which returns the message (run.cpp).
[[noreturn]] void fail(Site at, const char* format, ...);
// Holds one access of the current thread to bounds and order (racecheck.cpp).
void note_access(const void* p, size_t bytes, bool write);
// Runs the kernel in every thread of every block; the failure, or null (run.cpp).
const char* run(void (*kernel)(const void*), const void* parameters, const unsigned (&grid)[3],
                unsigned threads, size_t shared_bytes);

// Orders 0 and 1 run one warp as far as it can go before the next starts, lanes and warps up or
// down: the widest gap that a missing barrier can show. From 2 on the order is random with that
// seed.
inline Fibre* pick(Block& b, int preferred_warp) {
  auto random = [&](unsigned n) {
    b.random = b.random * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned((b.random >> 33) % n);
  };
  const int count = int(b.warps.size());
  int chosen = -1;
  if (b.order >= 2) {
    for (int i = 0, start = int(random(count)); i < count && chosen < 0; ++i)
      if (b.warps[(start + i) % count].ready) chosen = (start + i) % count;
  } else if (preferred_warp >= 0 && b.warps[preferred_warp].ready) {
    chosen = preferred_warp;
  } else {
    for (int i = 0; i < count && chosen < 0; ++i) {
      const int w = b.order == 0 ? i : count - 1 - i;
      if (b.warps[w].ready) chosen = w;
    }
  }
  if (chosen < 0) return nullptr;
  const unsigned ready = b.warps[chosen].ready;
  int lane = b.order == 1 ? 31 - __builtin_clz(ready) : __builtin_ctz(ready);
  if (b.order >= 2) {
    const int turn = int(random(32));
    const unsigned turned = turn ? (ready >> turn | ready << (32 - turn)) : ready;
    lane = (__builtin_ctz(turned) + turn) & 31;
  }
  return &b.fibres[chosen * 32 + lane];
}

// Hands over to the next thread that can run; when all are done, to the launch.
inline void go_to_next(Block& b, Fibre& me, int preferred_warp) {
  Fibre* next = pick(b, preferred_warp);
  if (next == &me) return;
  if (!next && b.alive) {
    for (const Fibre& f : b.fibres)
      if (!f.done)
        fail(f.site, "deadlock: %d threads wait, thread %d for %s", b.alive, f.id, f.waits_for);
  }
  b.current = next;
  context_swap(me.context, next ? next->context : b.home);
}
inline void stop(Block& b, Fibre& f, const char* why) {
  f.waits_for = why;
  b.warps[f.warp].ready &= ~(1u << f.lane);
}
inline void wake(Block& b, Fibre& f) {
  f.waits_for = nullptr;
  f.at_barrier = false;
  b.warps[f.warp].ready |= 1u << f.lane;
}

// __syncthreads. Every thread must come to the same line: stricter than the hardware, as the
// language asks.
inline void barrier(Site site) {
  Block& b = *block;
  Fibre& f = *b.current;
  Barrier& r = b.barrier;
  const int count = int(b.fibres.size());
  f.site = site;
  if (b.alive != count)
    fail(site, "divergent __syncthreads: %d threads have exited", count - b.alive);
  if (!r.waiting) r.site = site;
  if (!same(r.site, site))
    fail(site, "divergent __syncthreads: %d threads wait at %s:%d", r.waiting, r.site.file,
         r.site.line);
  f.at_barrier = true;
  if (++r.waiting < count) {
    stop(b, f, "__syncthreads");
    return go_to_next(b, f, f.warp);
  }
  r.waiting = 0;
  ++b.epoch;
  for (Fibre& other : b.fibres) wake(b, other);
  go_to_next(b, f, -1);  // the order starts afresh, rather than with whoever came last
}

// All lanes of `mask` meet; the last to come runs `work(arguments, mask)` for all of them.
template <class Work>
inline void collective(unsigned mask, const char* what, void* argument, Site site, Work work) {
  Block& b = *block;
  Fibre& f = *b.current;
  Warp& w = b.warps[f.warp];
  f.site = site;
  if (!(mask >> f.lane & 1))
    fail(site, "%s: lane %d is not in its own mask %08x", what, f.lane, mask);
  const int lanes = min<int>(32, int(b.fibres.size()) - f.warp * 32);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  Collective* found = nullptr;
  for (Collective& p : w.pending)
    if (p.arrived && p.mask == mask) found = &p;
  for (Collective* p = w.pending; !found; ++p)
    if (!p->arrived) found = p, p->mask = mask, p->what = what;
  Collective& c = *found;
  if (c.what != what) fail(site, "divergent warp: %s meets %s, mask %08x", what, c.what, mask);
  c.arrived |= 1u << f.lane;
  c.argument[f.lane] = argument;
  if (c.arrived != mask) {
    stop(b, f, what);
    return go_to_next(b, f, f.warp);
  }
  c.arrived = 0;
  work(c.argument, mask);
  for (unsigned rest = mask & ~(1u << f.lane); rest; rest &= rest - 1)
    wake(b, b.fibres[f.warp * 32 + __builtin_ctz(rest)]);
}

// A vector must lie at a multiple of its size; the compiler may have split the access by the time
// that note_access sees it.
inline void require_aligned(const void* p, size_t bytes, Site site) {
  if (uintptr_t(p) % bytes) fail(site, "a vector of %zu bytes at %p is not aligned", bytes, p);
}

inline bool in_shared(const void* p, size_t bytes) {
  const auto at = static_cast<const unsigned char*>(p);
  const Block& b = *block;
  return (at >= b.dynamic && at + bytes <= b.dynamic + b.dynamic_bytes) ||
         (at >= b.arena && at + bytes <= b.arena + b.static_bytes);
}
inline unsigned char* dynamic_shared() { return block->dynamic; }
// The static array that `key` (an address of its own) stands for.
inline unsigned char* static_shared(const void* key, size_t bytes, Site at = Site::here()) {
  Block& b = *block;
  for (const auto& s : b.statics)
    if (s.key == key) return s.at;
  unsigned char* start = b.arena + b.static_bytes;
  b.static_bytes += (bytes + 127) & ~size_t(127);
  if (b.static_bytes + b.dynamic_bytes > kSharedBytes)
    fail(at, "static and dynamic shared memory exceed %zu bytes", kSharedBytes);
  b.statics.push_back({key, start});
  return start;
}

// Runs `kKernel(parameters)` in every thread of every block; the failure, or null.
template <class P, void (*kKernel)(const P&)>
const char* launch(const unsigned (&grid)[3], unsigned threads, size_t shared_bytes,
                   const P& parameters) {
  return run([](const void* p) { kKernel(*static_cast<const P*>(p)); }, &parameters, grid, threads,
             shared_bytes);
}

}  // namespace host_run
