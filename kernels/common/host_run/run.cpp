// run.cpp: starts kernels, gives them memory and catches what they do wrong.
//
// Memory starts as NaN and ends at a protected page (to 16 bytes; racecheck.cpp sees the rest).
// What is given back is protected; its addresses are used again once all has been. One launch runs
// at a time in the process.
#include "run.hpp"

#include <signal.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

namespace host_run {

// ------------------------------------------------------------------------------------------ memory
unsigned char* global_start = nullptr;

namespace {
constexpr size_t kPages = kGlobalBytes / kPage;
std::mutex launching;
size_t next_page = 1, in_use = 0;
std::vector<Buffer> buffers;        // by number; 0 is none
std::unique_ptr<uint32_t[]> owner;  // of each page of global memory: a buffer's number

unsigned char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(p);
}
void open(unsigned char* p, size_t bytes) {
  if (mprotect(p, bytes, PROT_READ | PROT_WRITE)) std::abort();
}
// Pages between two protected ones.
unsigned char* guarded(size_t bytes) {
  unsigned char* p = reserve(bytes + 2 * kPage) + kPage;
  open(p, bytes);
  return p;
}
}  // namespace

const Buffer* buffer_at(const void* p) {
  const auto at = static_cast<const unsigned char*>(p);
  if (!global_start || at < global_start || at >= global_start + kGlobalBytes) return nullptr;
  const uint32_t number = owner[size_t(at - global_start) / kPage];
  return number ? &buffers[number] : nullptr;
}

// ---------------------------------------------------------------------------------------- failures
void fail(Site at, const char* format, ...) {
  Block& b = *block;
  Fibre& f = *b.current;
  va_list list;
  va_start(list, format);
  const int used = std::vsnprintf(b.failure, sizeof b.failure, format, list);
  va_end(list);
  if (used >= 0 && size_t(used) < sizeof b.failure)
    std::snprintf(b.failure + used, sizeof b.failure - size_t(used),
                  " [block (%u,%u,%u) thread %d, %s:%d]", b.idx.x, b.idx.y, b.idx.z, f.id, at.file,
                  at.line);
  context_swap(f.context, b.home);  // for good: nothing on the fibres' stacks owns anything
  std::abort();
}

namespace {
void on_fault(int, siginfo_t* info, void*) {
  if (!block || !block->current) {  // not a kernel's: as if there were no handler
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  fail(block->current->site, "address %p is outside every buffer (last collective before it:)",
       info->si_addr);
}

// Takes over SIGSEGV for one launch. Fibres have no room for a handler, so it has a stack of its
// own.
class Faults {
 public:
  Faults() {
    static unsigned char* const stack = guarded(64 << 10);
    stack_t ours{};
    ours.ss_sp = stack, ours.ss_size = 64 << 10;
    sigaltstack(&ours, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // a failing handler never returns
    sigaction(SIGSEGV, &action, &old_action_);
  }
  ~Faults() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_;
  struct sigaction old_action_;
};

// ------------------------------------------------------------------------------------------ launch
uint64_t fibre_order = 0;

void fibre_main() {
  Block& b = *block;
  b.kernel(b.parameters);
  Fibre& f = *b.current;
  if (!f.copies.empty()) fail(f.site, "the thread ends with a cp.async that was never waited for");
  f.done = true;
  --b.alive;
  if (b.barrier.waiting)
    fail(b.barrier.site, "divergent __syncthreads: a thread exited while %d wait there",
         b.barrier.waiting);
  stop(b, f, "exit");
  go_to_next(b, f, f.warp);
  std::abort();
}

void run_block(Block& b) {
  b.statics.clear();
  b.static_bytes = 0;
  ++b.serial;
  ++b.epoch;
  b.random = b.order * 0x9e3779b97f4a7c15ull + b.idx.x;
  std::memset(b.arena, kPoison, kArenaBytes);
  b.barrier = {};
  for (Warp& w : b.warps) w = {};
  for (Fibre& f : b.fibres) {
    f.copies.clear();
    f.next_group = 0;
    f.done = false;
    f.site = {"(start)", 0};
    wake(b, f);
    context_make(f.context, b.stacks[size_t(f.id)], kStackBytes, fibre_main);
  }
  b.alive = int(b.fibres.size());
  b.current = pick(b, -1);
  context_swap(b.home, b.current->context);
  b.current = nullptr;
}

void prepare(Block& b, unsigned threads, size_t shared_bytes) {
  if (!b.arena) b.arena = guarded(kArenaBytes);
  while (b.stacks.size() < threads)
    b.stacks.push_back(reinterpret_cast<char*>(guarded(kStackBytes)));
  b.dynamic_bytes = shared_bytes;
  b.dynamic = b.arena + kArenaBytes - ((shared_bytes + 127) & ~size_t(127));
  b.fibres.resize(threads);
  b.warps.assign((threads + 31) / 32, Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& f = b.fibres[i];
    f.id = int(i), f.lane = int(i % 32), f.warp = int(i / 32);
    f.thread_idx = {i, 0, 0};
  }
}
}  // namespace

const char* run(void (*kernel)(const void*), const void* parameters, const unsigned (&grid)[3],
                unsigned threads, size_t shared_bytes) {
  static Block own{};
  const std::lock_guard<std::mutex> lock(launching);
  if (threads == 0 || threads > 1024 || shared_bytes > kSharedBytes || grid[1] > 65535 ||
      grid[2] > 65535)
    return "no device takes this launch: too many threads, too much shared memory or too large a "
           "grid";
  const Faults faults;
  prepare(own, threads, shared_bytes);
  own.grid = {grid[0], grid[1], grid[2]};
  own.dim = {threads, 1, 1};
  own.kernel = kernel, own.parameters = parameters;
  own.order = fibre_order;
  own.launch_serial = own.serial + 1;
  own.failure[0] = 0;
  block = &own;
  const uint64_t total = uint64_t(grid[0]) * grid[1] * grid[2];
  for (uint64_t i = 0; i < total && !own.failure[0]; ++i) {
    const uint64_t at = own.order == 1 ? total - 1 - i : i;
    own.idx = {unsigned(at % grid[0]), unsigned(at / grid[0] % grid[1]),
               unsigned(at / (uint64_t(grid[0]) * grid[1]))};
    run_block(own);
  }
  block = nullptr;
  return own.failure[0] ? own.failure : nullptr;
}

}  // namespace host_run

// ----------------------------------------------------------------------- what the tests call
// (Rust)
extern "C" {
// `bytes` bytes of NaN that kernels may read and write; null when there are no more.
void* host_run_allocate(size_t bytes) {
  using namespace host_run;
  const std::lock_guard<std::mutex> lock(launching);
  if (!global_start) {
    global_start = reserve(kGlobalBytes);
    owner.reset(new uint32_t[kPages]());
    buffers.push_back({nullptr, 0});
  }
  const size_t used = (bytes + 15) & ~size_t(15), pages = (used + kPage - 1) / kPage;
  if (next_page + pages + 1 > kPages) return nullptr;
  unsigned char* start = global_start + next_page * kPage;
  if (pages) open(start, pages * kPage);
  std::memset(start, kPoison, pages * kPage);
  for (size_t page = next_page; page < next_page + pages; ++page)
    owner[page] = uint32_t(buffers.size());
  buffers.push_back({start + pages * kPage - used, bytes});
  next_page += pages + 1;
  ++in_use;
  return buffers.back().start;
}

// Takes back what host_run_allocate gave.
void host_run_free(void* start) {
  using namespace host_run;
  const std::lock_guard<std::mutex> lock(launching);
  size_t page = size_t(static_cast<unsigned char*>(start) - global_start) / kPage;
  for (const uint32_t number = owner[page]; number && owner[page] == number; ++page) {
    owner[page] = 0;
    mprotect(global_start + page * kPage, kPage, PROT_NONE);
  }
  if (--in_use) return;
  next_page = 1;
  buffers.resize(1);
}

// In which order threads run from now on: 0 up, 1 down (blocks too), n at random with seed n.
void host_run_order(uint64_t order) {
  const std::lock_guard<std::mutex> lock(host_run::launching);
  host_run::fibre_order = order;
}
}
