// racecheck.cpp: holds every access of a kernel to its buffers' bounds and to the order that
// barriers make, whatever order the fibres ran in.
//
// Kernels are compiled with -fsanitize=thread: the compiler then calls __tsan_readN or
// __tsan_writeN at each access. Those functions are ours, here, and this file is compiled without
// the flag. A cell of shadow stands for two bytes. An access is a race when an earlier one, one of
// the two a write, is
//   * another block's of the same launch (global memory), or
//   * another thread's of the same block with neither a __syncthreads between them nor, in the same
//     warp, a full __syncwarp (shuffles, ldmatrix and mma order nothing: as the language says).
// Refuses accesses of one byte: a cell could not tell neighbours apart.
#include <memory>

#include "run.hpp"

namespace host_run {
namespace {

struct Access {
  uint32_t block = 0;  // Block::serial; 0 is none
  uint32_t epoch = 0, warp_epoch = 0;
  int32_t thread = -1;
};
struct Cell {
  Access write, read, other_read;  // other_read: a reader of another warp or block, if there is one
};
constexpr size_t kCellBytes = 2;

// Shadow of `bytes` bytes, in pieces that exist once they are touched.
class Shadow {
 public:
  explicit Shadow(size_t bytes) : pieces_(bytes / kCellBytes / kPiece + 1) {}
  Cell& at(size_t byte) {
    const size_t cell = byte / kCellBytes;
    std::unique_ptr<Cell[]>& piece = pieces_[cell / kPiece];
    if (!piece) piece.reset(new Cell[kPiece]);
    return piece[cell % kPiece];
  }

 private:
  static constexpr size_t kPiece = 1 << 14;
  std::vector<std::unique_ptr<Cell[]>> pieces_;
};

// Whether `earlier` happened before what `f` does now.
bool ordered(const Access& earlier, const Fibre& f) {
  const Block& b = *block;
  if (earlier.block < b.launch_serial) return true;
  if (earlier.block != b.serial) return false;
  if (earlier.thread == f.id || earlier.epoch != b.epoch) return true;
  return earlier.thread / 32 == f.warp && earlier.warp_epoch != b.warps[size_t(f.warp)].epoch;
}

void check(Cell& c, bool write, const char* where, long offset) {
  const Block& b = *block;
  const Fibre& f = *b.current;
  const Access now{b.serial, b.epoch, b.warps[size_t(f.warp)].epoch, f.id};
  const char* verb = write ? "write" : "read";
  if (!ordered(c.write, f))
    fail(f.site, "race: %s at %s offset %ld of what thread %d %s wrote (after:)", verb, where,
         offset, c.write.thread, c.write.block == b.serial ? "of this block" : "of another block");
  if (!write) {
    const bool same_warp = c.read.block == b.serial && c.read.thread / 32 == f.warp;
    if (!same_warp && !ordered(c.read, f)) c.other_read = c.read;
    c.read = now;
    return;
  }
  for (const Access* r : {&c.read, &c.other_read})
    if (!ordered(*r, f))
      fail(f.site, "race: write at %s offset %ld of what thread %d %s read (after:)", where, offset,
           r->thread, r->block == b.serial ? "of this block" : "of another block");
  c.write = now;
}

void check_shared(const unsigned char* at, size_t bytes, bool write) {
  static Shadow shadow(kArenaBytes);
  const Block& b = *block;
  const bool dynamic = at >= b.dynamic;
  const char* where = dynamic ? "dynamic shared" : "static shared";
  const long offset = dynamic ? at - b.dynamic : at - b.arena;
  if (!in_shared(at, bytes))
    fail(b.current->site, "%s of %zu bytes outside shared memory, at %s offset %ld (after:)",
         write ? "write" : "read", bytes, where, offset);
  for (size_t i = 0; i < bytes; i += kCellBytes) {
    Cell& c = shadow.at(size_t(at + i - b.arena));
    // Another block's use of the same place is none of this one's business.
    if (c.write.block != b.serial) {
      if (!write)
        fail(b.current->site, "read of shared memory never written, %s offset %ld (after:)", where,
             offset);
      c = Cell{};
    }
    check(c, write, where, offset + long(i));
  }
}

void check_global(const unsigned char* at, size_t bytes, bool write) {
  static Shadow shadow(kGlobalBytes);
  const Buffer* buffer = buffer_at(at);
  if (!buffer) return;  // a protected page: the access itself faults
  const long offset = at - buffer->start;
  if (offset < 0 || size_t(offset) + bytes > buffer->bytes)
    fail(block->current->site, "%s of %zu bytes at offset %ld of a buffer of %zu bytes (after:)",
         write ? "write" : "read", bytes, offset, buffer->bytes);
  for (size_t i = 0; i < bytes; i += kCellBytes)
    check(shadow.at(size_t(at + i - global_start)), write, "global", offset + long(i));
}

}  // namespace

void note_access(const void* p, size_t bytes, bool write) {
  const Block* b = block;
  if (!b || !b->current) return;
  const auto at = static_cast<const unsigned char*>(p);
  const bool shared = at >= b->arena && at < b->arena + kArenaBytes;
  if (!shared && !(global_start && at >= global_start && at < global_start + kGlobalBytes)) return;
  if (bytes < kCellBytes || size_t(at) % kCellBytes)
    fail(b->current->site, "an access of %zu bytes at %p: kernels use whole 16-bit words (after:)",
         bytes, p);
  shared ? check_shared(at, bytes, write) : check_global(at, bytes, write);
}

}  // namespace host_run

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t bytes) { host_run::note_access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { host_run::note_access(p, bytes, true); }
#define HOST_RUN_ACCESS(n)                                                       \
  void __tsan_read##n(void* p) { host_run::note_access(p, n, false); }           \
  void __tsan_write##n(void* p) { host_run::note_access(p, n, true); }           \
  void __tsan_unaligned_read##n(void* p) { host_run::note_access(p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { host_run::note_access(p, n, true); }
HOST_RUN_ACCESS(1)
HOST_RUN_ACCESS(2)
HOST_RUN_ACCESS(4)
HOST_RUN_ACCESS(8)
HOST_RUN_ACCESS(16)
}
