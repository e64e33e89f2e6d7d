//! What the ops of `allreel_kernels` hold: their results, and what they take beside them while they run.
//!
//! Sizes are of rows and columns; each function names the file whose allocations it repeats. What is smaller
//! than a row of activations for each row is left out.

use allreel_kernels::attention::Span;

use super::ledger::{Component, Held, Ledger};

/// Rows that a task of the CPU takes (`common/mod.rs`), and a part of a sum over rows on a device
/// (`common/device/parameters.rs`): each has sums of its own.
const ROWS_PER_TASK: usize = 32;
const ROWS_PER_PART: usize = 128;
/// The `gemm` crate cuts the inner dimension into equal parts of at most so many. It packs a weight whole that has
/// no more than so many rows, and the gradient of one that has more than so many columns (with AVX-512).
const PACKED_DEPTH: usize = 512;
const PACKED_ROWS: usize = 896;
const PACKED_COLUMNS: usize = 128;
/// Columns, depth and rows of a task over quantised weights (`quantized/cpu.rs`).
const QUANTIZED_TASK: [usize; 3] = [192, 512, 1024];
/// Dequantised weights on a device, and the most tokens for which there are none (`quantized/device.rs`).
const QUANTIZED_SCRATCH: usize = 64 << 20;
const QUANTIZED_FUSED: usize = 16;
/// Query rows of a tile of plain attention, and of a prefix (`attention/cpu.rs`, `prefix/cpu.rs`).
const TILE: usize = 64;
/// Blocks of a device's sums over positions or a prefix (`disentangled/device.rs`, `prefix/device.rs`).
const BLOCKS: usize = 264;
/// The size of heads that a device's kernels take; narrower ones are widened.
const HEAD: usize = 64;

/// Where a network computes, and what is held there.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Memory of the activations: the device's, or on a CPU the host's.
    pub ledger: Ledger,
    /// Memory of the host.
    pub host: Ledger,
    /// Whether that is a CUDA device.
    pub cuda: bool,
    /// Threads of the CPU.
    pub threads: usize,
}

/// A ragged batch of equally long sequences, virtual tokens among theirs.
#[derive(Clone, Copy, Debug)]
pub struct Ragged {
    /// B.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
}

impl Ragged {
    /// T.
    pub fn tokens(self) -> usize {
        self.sequences * self.length
    }
}

/// Heads of an attention, and their size.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// h.
    pub count: usize,
    /// d.
    pub size: usize,
}

impl Heads {
    /// Columns of all.
    pub fn width(self) -> usize {
        self.count * self.size
    }

    /// As a device's kernels take them.
    fn widened(self) -> Self {
        Self { size: HEAD, ..self }
    }
}

impl Machine {
    /// Bytes of an element of activations and of matrices.
    pub fn element(&self) -> usize {
        if self.cuda { 2 } else { 4 }
    }

    /// A tensor of activations.
    pub fn tensor(&self, rows: usize, columns: usize) -> Held {
        self.ledger.hold(Component::Workspace, rows * columns * self.element())
    }

    /// A tensor of f32 on either.
    pub fn numbers(&self, count: usize) -> Held {
        self.ledger.hold(Component::Workspace, count * 4)
    }

    /// `x` with dropout, or itself without.
    pub fn dropout(&self, x: &Held, (rows, columns): (usize, usize), drops: bool) -> Held {
        if drops { self.tensor(rows, columns) } else { x.clone() }
    }

    /// The sums of `columns` that each part of the rows makes, `count` times (`linear`, `norm`, `activation`).
    pub fn column_sums(&self, rows: usize, columns: usize, count: usize) {
        let part = if self.cuda { ROWS_PER_PART } else { ROWS_PER_TASK };
        self.ledger.touch(rows.div_ceil(part) * columns * count * 4);
    }

    /// Packing of a product of a weight `[outputs, inner]` (`linear/cpu.rs`).
    pub fn packing_forward(&self, outputs: usize, inner: usize) {
        if !self.cuda && outputs <= PACKED_ROWS {
            self.ledger.touch(packed_depth(inner) * outputs * 4);
        }
    }

    /// Packing of the gradient of a weight `[outputs, inputs]`, a sum over `rows`.
    pub fn packing_gradient(&self, rows: usize, outputs: usize, inputs: usize) {
        if !self.cuda && inputs > PACKED_COLUMNS {
            self.ledger.touch(packed_depth(rows) * outputs * 4);
        }
    }

    /// A product `[tokens, width]`, sums of `inner` terms, with a quantised weight: on the CPU a tile of it for
    /// each thread, which forward packs too; on a device as much of `width` as there is room for.
    pub fn dequantized(&self, tokens: usize, width: usize, inner: usize, forward: bool) {
        if self.cuda {
            let bytes = inner * 2;
            if !(forward && tokens <= QUANTIZED_FUSED) {
                self.ledger.touch(width.min((QUANTIZED_SCRATCH / bytes).max(1)) * bytes);
            }
            return;
        }
        let [columns, depth, height] = QUANTIZED_TASK;
        let tasks = width.div_ceil(columns) * tokens.div_ceil(height);
        let packed = if forward { width.min(columns) * inner.min(depth) } else { 0 };
        self.ledger.touch(self.threads.min(tasks) * (columns * depth + packed) * 4);
    }

    /// `(y, z, moments)` of `norm::forward`.
    pub fn norm(&self, rows: usize, columns: usize) -> (Held, [Held; 2]) {
        let (y, z) = (self.tensor(rows, columns), self.tensor(rows, columns));
        let moments = self.numbers(2 * rows);
        (y, [z.saved(), moments.saved()])
    }

    /// `(dx, dz)` of `norm::backward`, with `sums` gradients of vectors.
    pub fn norm_backward(
        &self,
        (rows, columns): (usize, usize),
        drops: bool,
        sums: usize,
    ) -> (Held, Held) {
        let dz = self.tensor(rows, columns);
        let dx = self.dropout(&dz, (rows, columns), drops);
        self.column_sums(rows, columns, sums);
        (dx, dz)
    }

    /// `dh` of `activation::backward`, and the bias' gradient.
    pub fn activation_backward(&self, rows: usize, columns: usize, bias: bool) -> Held {
        let dh = self.tensor(rows, columns);
        self.column_sums(rows, columns, usize::from(bias));
        dh
    }

    /// `(o, lse)` of plain attention.
    pub fn attention(&self, ragged: Ragged, heads: Heads, span: Span) -> [Held; 2] {
        let wide = self.widened(ragged, heads, 4);
        let o = self.tensor(ragged.tokens(), heads.width());
        let lse = self.numbers(heads.count * ragged.tokens());
        let rows = TILE.min(ragged.length) + 1 + heads.size;
        self.in_threads(rows * widest(span, ragged.length));
        drop(wide);
        [o, lse]
    }

    /// `[dq, dk, dv]` of plain attention.
    pub fn attention_backward(&self, ragged: Ragged, heads: Heads, span: Span) -> [Held; 3] {
        let wide = self.widened(ragged, heads, 8);
        let gradients = std::array::from_fn(|_| self.tensor(ragged.tokens(), heads.width()));
        let delta = self.delta(ragged, heads);
        let rows = 2 * TILE.min(ragged.length) + 1 + heads.size;
        self.in_threads(rows * widest(span, ragged.length));
        drop((wide, delta));
        gradients
    }

    /// `(o, lse)` of disentangled attention with `tables` of `rows`.
    pub fn disentangled(
        &self,
        ragged: Ragged,
        heads: Heads,
        (tables, rows): (usize, usize),
    ) -> [Held; 2] {
        let wide = self.widened(ragged, heads, 4);
        let wide_tables = self.widened_rows(tables * rows, heads);
        let spread = self.spread_tables(ragged.length, heads, tables);
        let o = self.tensor(ragged.tokens(), heads.width());
        let lse = self.numbers(heads.count * ragged.tokens());
        self.in_threads(layout::forward_task(ragged.length, heads.size));
        drop((wide, wide_tables, spread));
        [o, lse]
    }

    /// `[dq, dk, dv]` and the gradients of the tables, if they are `wanted`.
    pub fn disentangled_backward(
        &self,
        ragged: Ragged,
        heads: Heads,
        (tables, rows): (usize, usize),
        wanted: bool,
    ) -> ([Held; 3], Vec<Held>) {
        let wide = self.widened(ragged, heads, 8);
        let wide_tables = self.widened_rows(2 * tables * rows, heads);
        let spread = self.spread_tables(ragged.length, heads, tables);
        let gradients = std::array::from_fn(|_| self.tensor(ragged.tokens(), heads.width()));
        let wanted = if wanted { tables } else { 0 };
        let table = || self.tensor(rows, heads.width());
        let of_tables = if self.cuda {
            let delta = self.delta(ragged, heads);
            let tiles = ragged.sequences * ragged.length.div_ceil(TILE);
            let parts = tiles.min(BLOCKS.div_ceil(heads.count));
            let sum = |_| {
                let partials = self.numbers(parts * rows * heads.widened().width());
                let gradient = table();
                drop(partials);
                gradient
            };
            let of_tables = (0..wanted).map(sum).collect();
            drop(delta);
            of_tables
        } else {
            self.in_threads(layout::backward_task(ragged.length, heads.size, wanted));
            let tasks = heads.count * layout::groups(ragged);
            let partials = self.numbers(tasks * wanted * rows * heads.size);
            let of_tables = (0..wanted).map(|_| table()).collect();
            drop(partials);
            of_tables
        };
        drop((wide, wide_tables, spread));
        (gradients, of_tables)
    }

    /// `(o, lse)` with a prefix of `n` rows joined.
    pub fn prefix(&self, ragged: Ragged, heads: Heads, n: usize) -> [Held; 2] {
        let wide = self.widened(ragged, heads, 3);
        let o = self.tensor(ragged.tokens(), heads.width());
        let lse = self.numbers(heads.count * ragged.tokens());
        self.in_threads((TILE + 1 + heads.size) * n);
        drop(wide);
        [o, lse]
    }

    /// Gradients of the prefix's keys and values.
    pub fn prefix_backward(&self, ragged: Ragged, heads: Heads, n: usize) -> [Held; 2] {
        /// Rows of a task (`prefix/cpu.rs`).
        const PART: usize = 512;
        let wide = self.widened(ragged, heads, 4);
        let parts = if self.cuda {
            let tiles = ragged.sequences * ragged.length.div_ceil(TILE);
            tiles.min(BLOCKS.div_ceil(heads.count * n.div_ceil(TILE)))
        } else {
            self.in_threads((2 * TILE + 1 + heads.size) * n);
            ragged.tokens().div_ceil(PART)
        };
        let partials = self.numbers(parts * 2 * n * heads.width());
        let gradients = std::array::from_fn(|_| self.numbers(n * heads.width()));
        drop((wide, partials));
        gradients
    }

    /// The convolution of `[T, inputs]` to `[T, outputs]` over `taps` tokens.
    pub fn convolution(
        &self,
        tokens: usize,
        (inputs, outputs): (usize, usize),
        taps: usize,
    ) -> Held {
        self.convolved(tokens, (inputs, outputs), inputs * taps)
    }

    /// The gradient of its input.
    pub fn convolution_input(
        &self,
        tokens: usize,
        (inputs, outputs): (usize, usize),
        taps: usize,
    ) -> Held {
        self.convolved(tokens, (outputs, inputs), inputs * taps)
    }

    /// Spread by rows on the CPU, `windows` side by side on a device.
    fn convolved(&self, tokens: usize, (from, to): (usize, usize), windows: usize) -> Held {
        if self.cuda {
            let windows = self.tensor(tokens, windows);
            let y = self.tensor(tokens, to);
            drop(windows);
            return y;
        }
        let sum = self.tensor(tokens, to);
        self.ledger.touch(tokens * from * 4);
        let y = self.tensor(tokens, to);
        drop(sum);
        y
    }

    /// The gradient of its weight.
    pub fn convolution_weight(
        &self,
        tokens: usize,
        (inputs, outputs): (usize, usize),
        taps: usize,
    ) {
        let columns = if self.cuda { inputs * taps } else { inputs + outputs };
        self.ledger.touch(tokens * columns * self.element());
    }

    /// The gradient of a table's rows, where `rows` of them occur (`embedding/cpu.rs`, `device.rs`).
    pub fn sparse_rows(&self, rows: usize, width: usize) -> Held {
        let sums = self.cuda.then(|| self.numbers(rows * width));
        let values = self.ledger.hold(Component::Gradients, rows * width * 4);
        drop(sums);
        values
    }

    /// Gradients of rows added to those of a small table.
    pub fn dense_rows(&self, rows: usize, width: usize) {
        self.ledger.touch(rows * width * 4);
    }

    /// `elements` of f32 in each thread.
    fn in_threads(&self, elements: usize) {
        if !self.cuda {
            self.ledger.touch(self.threads * elements * 4);
        }
    }

    /// What backward of a device's attention sums of each row first.
    fn delta(&self, ragged: Ragged, heads: Heads) -> Held {
        self.numbers(if self.cuda { heads.count * ragged.tokens() } else { 0 })
    }

    /// The relative tables of all heads, by distance (`disentangled/cpu.rs`).
    fn spread_tables(&self, length: usize, heads: Heads, tables: usize) -> Held {
        let each = if self.cuda { 0 } else { layout::spread(length, heads.size) };
        self.numbers(tables * heads.count * each)
    }

    /// Copies of `count` operands with heads as wide as a device's kernels take them.
    fn widened(&self, ragged: Ragged, heads: Heads, count: usize) -> Held {
        self.widened_rows(count * ragged.tokens(), heads)
    }

    fn widened_rows(&self, rows: usize, heads: Heads) -> Held {
        let rows = if self.cuda && heads.size < HEAD { rows } else { 0 };
        self.tensor(rows, heads.widened().width())
    }
}

/// How much of an inner dimension is packed at once.
fn packed_depth(inner: usize) -> usize {
    inner.div_ceil(inner.div_ceil(PACKED_DEPTH).max(1))
}

/// The most keys that a tile of queries sees (`attention/cpu.rs`).
fn widest(span: Span, length: usize) -> usize {
    let seen = |window: usize| if span.causal { window } else { 2 * window };
    // Where they start is rounded down to what dropout draws at once.
    span.window.map_or(length, |window| length.min(TILE + seen(window) + 8))
}

/// Sizes of `disentangled/cpu/layout.rs`, in elements.
mod layout {
    use super::Ragged;

    const LANES: usize = 16;
    const ROWS: usize = 6;
    const TILE: usize = 96;
    /// Tokens of the sequences of one task of backward (`disentangled/cpu/backward.rs`).
    const TOKENS_PER_TASK: usize = 512;

    fn odd(columns: usize) -> usize {
        (columns.div_ceil(LANES) | 1) * LANES
    }

    fn packed(rows: usize, columns: usize) -> usize {
        (rows + ROWS) * columns.next_multiple_of(LANES)
    }

    fn transposed(rows: usize, columns: usize) -> usize {
        columns * odd(rows)
    }

    fn tile(length: usize) -> usize {
        let stride = odd(LANES + length + ROWS - 1 + LANES - 1);
        (TILE.min(length.next_multiple_of(ROWS)) + 2 * ROWS) * stride
    }

    /// One head's table, as rows and as columns.
    pub(super) fn spread(length: usize, d: usize) -> usize {
        let end = 2 * (length + LANES) - 1 + ROWS;
        packed(end, d) + transposed(end, d)
    }

    pub(super) fn forward_task(length: usize, d: usize) -> usize {
        4 * packed(length, d) + transposed(length, d) + tile(length) + length
    }

    pub(super) fn backward_task(length: usize, d: usize, tables: usize) -> usize {
        let sums = tables * packed(2 * length - 1, d);
        7 * packed(length, d) + 2 * transposed(length, d) + 2 * tile(length) + sums + length
    }

    /// Groups of sequences whose tasks have sums of their own.
    pub(super) fn groups(ragged: Ragged) -> usize {
        ragged.sequences.div_ceil((TOKENS_PER_TASK / ragged.length).max(1))
    }
}
