//! Where the allocator puts large blocks of the host's memory, and what of its address space was ever touched.
//!
//! The binary tells mimalloc to keep its pages (`common/threads.rs`), so a process is as large as all that it
//! ever wrote to, holes between blocks too. Blocks of more than 512 KiB lie in slices of 64 KiB; 512 slices are a
//! chunk, which a block does not cross unless it is larger, and then it has whole ones; chunks are in arenas of
//! 1 GiB. The first hole is taken, in chunks that are in use before others (`arena.c`, `bitmap.c` of mimalloc 3.3).
//! Smaller blocks share pages; they are counted as they are.
//!
//! Held to the allocator itself, in five programs that take and free like a training step of 0.4 to 4.3 GB: within
//! 0.5 % without huge pages, from -6 to +1.3 % with them.

use std::ops::Range;

const SLICE: usize = 64 << 10;
const CHUNK: usize = 512;
/// Chunks of an arena: 1 GiB.
const CHUNKS: usize = 32;
/// Slices at the start of an arena that the allocator takes for itself and for small blocks.
const OWN: usize = 37;
/// Slices of a huge page of 2 MiB, which Linux gives as a whole.
const HUGE_PAGE: usize = 32;
/// Blocks up to this share pages.
const SHARED: usize = 512 << 10;
/// A page's header, in front of a block.
const HEADER: usize = 4 << 10;

/// The address space of a process: arenas, one after the other.
#[derive(Debug)]
pub(super) struct Space {
    arenas: Vec<Arena>,
    /// Pages that were ever touched.
    touched: usize,
    /// Slices of a page.
    page: usize,
}

#[derive(Debug)]
struct Arena {
    chunks: Vec<Chunk>,
}

#[derive(Clone, Debug)]
struct Chunk {
    taken: [bool; CHUNK],
    /// By page.
    touched: [bool; CHUNK],
    free: usize,
    /// What it is for as long as a block is at its start.
    kept_for: Option<Kind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Blocks that lie in one chunk.
    Inside,
    /// A block of several.
    Across,
}

/// Slices of a block, over all arenas; none where it shares pages.
pub(super) type Place = Range<usize>;

impl Space {
    /// Nothing yet, on a machine with or without huge pages.
    pub(super) fn new(huge_pages: bool) -> Self {
        let page = if huge_pages { HUGE_PAGE } else { 1 };
        Self { arenas: Vec::new(), touched: 0, page }
    }

    /// Puts a block somewhere.
    pub(super) fn take(&mut self, bytes: usize) -> Place {
        if bytes <= SHARED {
            return 0..0;
        }
        let slices = (rounded(bytes) + HEADER).div_ceil(SLICE);
        let mut arenas = self.arenas.iter().enumerate();
        let found = arenas.find_map(|(i, arena)| Some((i, arena.find(slices)?)));
        let (arena, at) = found.unwrap_or_else(|| {
            let chunks = CHUNKS.max(slices.div_ceil(CHUNK) + 1);
            self.arenas.push(Arena::new(chunks));
            let last = self.arenas.len() - 1;
            let at = self.arenas[last].find(slices);
            (
                last,
                at.unwrap_or_else(|| unreachable!("an arena is made as large as its first block")),
            )
        });
        self.touched += self.arenas[arena].take(at..at + slices, self.page);
        let start = self.arenas[..arena].iter().map(Arena::slices).sum::<usize>() + at;
        start..start + slices
    }

    /// Gives a block back.
    pub(super) fn give(&mut self, place: Place) {
        let mut start = place.start;
        for arena in &mut self.arenas {
            if start < arena.slices() {
                arena.give(start..start + place.len());
                return;
            }
            start -= arena.slices();
        }
    }

    /// Bytes that were ever touched.
    pub(super) fn touched(&self) -> usize {
        self.touched * self.page * SLICE
    }
}

impl Arena {
    fn new(chunks: usize) -> Self {
        let empty =
            Chunk { taken: [false; CHUNK], touched: [false; CHUNK], free: CHUNK, kept_for: None };
        let mut arena = Self { chunks: vec![empty; chunks] };
        let first = &mut arena.chunks[0];
        first.taken[..OWN].fill(true);
        first.free -= OWN;
        arena
    }

    fn slices(&self) -> usize {
        self.chunks.len() * CHUNK
    }

    /// A place for so many slices.
    fn find(&self, slices: usize) -> Option<usize> {
        if slices > CHUNK {
            let count = slices.div_ceil(CHUNK);
            let free = |first: &usize| {
                self.chunks[*first..first + count].iter().all(|chunk| chunk.free == CHUNK)
            };
            return (0..=self.chunks.len().checked_sub(count)?).find(free).map(|i| i * CHUNK);
        }
        [Some(Kind::Inside), None].into_iter().find_map(|kind| {
            let chunks = self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.kept_for == kind);
            chunks.filter_map(|(i, chunk)| Some(i * CHUNK + chunk.hole(slices)?)).next()
        })
    }

    /// Takes a place; returns how many pages, of so many slices, were not touched before.
    fn take(&mut self, place: Place, page: usize) -> usize {
        let kind = if place.len() > CHUNK { Kind::Across } else { Kind::Inside };
        let mut new = 0;
        for slice in place {
            let (chunk, at) = (&mut self.chunks[slice / CHUNK], slice % CHUNK);
            chunk.taken[at] = true;
            chunk.free -= 1;
            chunk.kept_for = if at == 0 { Some(kind) } else { chunk.kept_for };
            new += usize::from(!std::mem::replace(&mut chunk.touched[at / page], true));
        }
        new
    }

    fn give(&mut self, place: Place) {
        for slice in place {
            let chunk = &mut self.chunks[slice / CHUNK];
            chunk.taken[slice % CHUNK] = false;
            chunk.free += 1;
            chunk.kept_for = chunk.kept_for.filter(|_| chunk.free < CHUNK);
        }
    }
}

impl Chunk {
    /// The first hole of so many slices.
    fn hole(&self, slices: usize) -> Option<usize> {
        if self.free < slices {
            return None;
        }
        let mut run = 0;
        for (slice, taken) in self.taken.iter().enumerate() {
            run = if *taken { 0 } else { run + 1 };
            if run == slices {
                return Some(slice + 1 - slices);
            }
        }
        None
    }
}

/// As mimalloc rounds sizes (`_mi_os_good_alloc_size`).
fn rounded(bytes: usize) -> usize {
    const MIB: usize = 1 << 20;
    let to = match bytes {
        _ if bytes < 2 * MIB => SLICE,
        _ if bytes < 8 * MIB => 256 << 10,
        _ if bytes < 32 * MIB => MIB,
        _ => 4 * MIB,
    };
    bytes.next_multiple_of(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_filled_and_what_was_touched_stays() {
        const MIB: usize = 1 << 20;
        let mut space = Space::new(false);
        let blocks: Vec<Place> = (0..3).map(|_| space.take(10 * MIB)).collect();
        // Of 10 MiB and a slice, two lie behind what the allocator has in the first chunk.
        assert_eq!([blocks[0].start, blocks[2].start], [OWN, CHUNK]);
        assert_eq!(space.touched(), 3 * (10 * MIB + SLICE));
        // The chunk that a block begins comes before that with a hole and the allocator's own.
        space.give(blocks[1].clone());
        let small = space.take(4 * MIB);
        assert_eq!(small.start, blocks[2].end);
        let touched = space.touched();
        space.give(small.clone());
        assert_eq!((space.take(4 * MIB), space.touched()), (small, touched));
        // What is larger than a chunk begins one that is free, and has it alone.
        let huge = space.take(40 * MIB);
        assert_eq!((huge.start, space.take(28 * MIB).start), (2 * CHUNK, 4 * CHUNK));
        space.give(huge);
        assert_eq!(space.take(40 * MIB).start, 2 * CHUNK);
        // What does not fit begins an arena.
        assert_eq!(space.take(1000 * MIB).start, (CHUNKS + 1) * CHUNK);
        assert_eq!(space.take(MIB / 2), 0..0);
        // Behind 37 slices, a block of 3 MiB lies on two pages of 2 MiB.
        let mut space = Space::new(true);
        space.take(3 * MIB);
        assert_eq!(space.touched(), 4 * MIB);
    }
}
