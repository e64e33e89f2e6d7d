//! Which row each sequence is at in each step: sequences longest first, so that those still running are the
//! first ones.

use std::cmp::Reverse;

use super::Recurrence;

/// The sequences of a batch, longest first; those of one length in the batch's order.
pub(super) fn longest_first(op: Recurrence<'_>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..op.ragged.sequences()).collect();
    order.sort_by_key(|sequence| Reverse(op.ragged.range(*sequence).len()));
    order
}

/// Sequences that take their steps together, longest first. A sequence's place is that in the group.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) op: Recurrence<'a>,
    /// Their numbers in the batch.
    pub(super) sequences: &'a [usize],
}

impl Group<'_> {
    /// Steps of the longest.
    pub(super) fn steps(&self) -> usize {
        self.sequences.first().map_or(0, |longest| self.op.ragged.range(*longest).len())
    }

    /// How many sequences, the first ones, have a step `step`.
    pub(super) fn active(&self, step: usize) -> usize {
        self.sequences.partition_point(|sequence| self.op.ragged.range(*sequence).len() > step)
    }

    /// The row of the sequence at `place` in step `step`, which it must have.
    pub(super) fn row(&self, place: usize, step: usize) -> usize {
        let rows = self.op.ragged.range(self.sequences[place]);
        if self.op.reverse { rows.end - 1 - step } else { rows.start + step }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Result;

    use super::*;
    use crate::{Ragged, recurrence::Cell};

    #[test]
    fn sequences_run_longest_first_each_to_its_end() -> Result<()> {
        let ragged = Ragged::new(&[2, 1, 3, 2], &[0, 1, 2, 3])?;
        for (reverse, rows) in [(false, [[3, 0, 6], [4, 1, 7]]), (true, [[5, 1, 7], [4, 0, 6]])] {
            let op = Recurrence { cell: Cell::Gru, ragged: &ragged, reverse };
            let order = longest_first(op);
            assert_eq!(order, [2, 0, 3, 1]);
            let group = Group { op, sequences: &order };
            assert_eq!(group.steps(), 3);
            assert_eq!([0, 1, 2, 3].map(|step| group.active(step)), [4, 3, 1, 0]);
            assert_eq!([0, 1].map(|step| [0, 1, 2].map(|place| group.row(place, step))), rows);
            assert_eq!(Group { op, sequences: &[] }.steps(), 0);
        }
        Ok(())
    }
}
