//! One thread's way through a review.
//!
//! A word's own row stays here from when it comes into reach of the middle until it leaves, and only then
//! goes back, as a change: what other threads have made of the row meanwhile is kept.

use std::ops::Range;

use pulp::Arch;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_distr::Distribution;

use super::{
    Settings,
    corpus::Corpus,
    shared::{Shared, width},
    window::{Sigmoid, Window},
};

/// What a thread needs, kept from review to review.
pub(super) struct Walk<'a> {
    corpus: &'a Corpus,
    settings: &'a Settings,
    inputs: &'a Shared,
    outputs: &'a Shared,
    arch: Arch,
    width: usize,
    sigmoid: Sigmoid,
    /// The words of the review that were not left out.
    kept: Vec<u32>,
    /// Rows of the words within reach, by their place modulo the number of rows.
    near: Vec<f32>,
    /// What they were when they came.
    came: Vec<f32>,
    /// The word in the middle and those drawn, then their rows, and how these change.
    drawn: Vec<u32>,
    far: Vec<f32>,
    change: Vec<f32>,
    /// Rows of `near` that are in the window.
    slots: Vec<usize>,
    slopes: Vec<f32>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        corpus: &'a Corpus,
        settings: &'a Settings,
        inputs: &'a Shared,
        outputs: &'a Shared,
    ) -> Self {
        let width = width(settings.dimensions);
        let (reach, rows) = (2 * settings.window + 1, settings.negative + 1);
        Self {
            corpus,
            settings,
            inputs,
            outputs,
            arch: Arch::new(),
            width,
            sigmoid: Sigmoid::new(),
            kept: Vec::new(),
            near: vec![0.0; reach * width],
            came: vec![0.0; reach * width],
            drawn: Vec::with_capacity(rows),
            far: vec![0.0; rows * width],
            change: vec![0.0; rows * width],
            slots: Vec::with_capacity(reach),
            slopes: vec![0.0; rows],
        }
    }

    /// Learns from a review.
    pub(super) fn review(&mut self, ids: &[u32], rate: f32, rng: &mut ChaCha8Rng) {
        self.kept.clear();
        let kept = |id: &u32| {
            let share = self.corpus.kept[*id as usize];
            share >= 1.0 || rng.random::<f32>() < share
        };
        self.kept.extend(ids.iter().copied().filter(kept));
        let (count, window) = (self.kept.len(), self.settings.window);
        (0..count.min(window)).for_each(|at| self.arrive(at));
        for middle in 0..count {
            if middle + window < count {
                self.arrive(middle + window);
            }
            let reach = rng.random_range(1..=window);
            let first = middle.saturating_sub(reach);
            self.window(middle, first..(middle + reach + 1).min(count), rate, rng);
            if middle >= window {
                self.leave(middle - window);
            }
        }
        (count.saturating_sub(window)..count).for_each(|at| self.leave(at));
    }

    /// The place of a word's row in `near` and `came`.
    fn place(&self, at: usize) -> Range<usize> {
        let slot = at % (2 * self.settings.window + 1);
        slot * self.width..(slot + 1) * self.width
    }

    fn arrive(&mut self, at: usize) {
        let place = self.place(at);
        self.inputs.load(self.kept[at], &mut self.near[place.clone()]);
        self.came[place.clone()].copy_from_slice(&self.near[place]);
    }

    fn leave(&mut self, at: usize) {
        let place = self.place(at);
        let came = &mut self.came[place.clone()];
        for (old, new) in came.iter_mut().zip(&self.near[place]) {
            *old = new - *old;
        }
        self.inputs.add(self.kept[at], came);
    }

    /// The words of `around` learn to tell the one in the middle from others.
    fn window(&mut self, middle: usize, around: Range<usize>, rate: f32, rng: &mut ChaCha8Rng) {
        let reach = 2 * self.settings.window + 1;
        self.slots.clear();
        self.slots.extend(around.filter(|at| *at != middle).map(|at| at % reach));
        if self.slots.is_empty() {
            return;
        }
        let target = self.kept[middle];
        self.drawn.clear();
        self.drawn.push(target);
        for _ in 0..self.settings.negative {
            let id = self.corpus.noise.sample(rng) as u32;
            if id != target {
                self.drawn.push(id);
            }
        }
        let far = &mut self.far[..self.drawn.len() * self.width];
        for (id, row) in self.drawn.iter().zip(far.chunks_exact_mut(self.width)) {
            self.outputs.load(*id, row);
        }
        let change = &mut self.change[..far.len()];
        self.arch.dispatch(Window {
            width: self.width,
            near: &mut self.near,
            slots: &self.slots,
            far,
            change,
            slopes: &mut self.slopes,
            sigmoid: &self.sigmoid,
            rate,
        });
        for (id, row) in self.drawn.iter().zip(change.chunks_exact(self.width)) {
            self.outputs.add(*id, row);
        }
    }
}
