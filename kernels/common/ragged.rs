//! The shape of a ragged batch: sequences end to end, and where each begins.

use std::sync::OnceLock;

use candle_core::{Result, bail};

use super::Mirror;

/// Rows of a tile of the attention kernels.
pub const TILE: usize = 64;

/// `cu_seqlens` of a ragged batch, and which sample and position every row belongs to.
#[derive(Clone, Debug)]
pub struct Ragged {
    cu_seqlens: Vec<usize>,
    /// The same as kernels take it.
    starts: Mirror<i32>,
    tiles: OnceLock<Mirror<[i32; 2]>>,
    rows: RowIds,
    sequences: RowIds,
}

/// For every row of a `[rows, columns]` activation, the global sample id and the position in the
/// sample: what keys its dropout, wherever it is packed.
#[derive(Clone, Debug, Default)]
pub struct RowIds {
    /// Global sample id of each row.
    pub sample: Mirror<u32>,
    /// Position of each row inside its sample.
    pub position: Mirror<u32>,
}

impl Ragged {
    /// From the length of each sequence and its global sample id.
    ///
    /// # Errors
    /// If the two differ in number or a sequence is empty.
    pub fn new(lengths: &[usize], sample_ids: &[u32]) -> Result<Self> {
        if lengths.len() != sample_ids.len() {
            bail!("{} lengths for {} samples", lengths.len(), sample_ids.len());
        }
        let (mut cu_seqlens, mut sample, mut position) = (vec![0], Vec::new(), Vec::new());
        for (&length, &id) in lengths.iter().zip(sample_ids) {
            if length == 0 {
                bail!("sample {id} has no tokens");
            }
            sample.extend(std::iter::repeat_n(id, length));
            position.extend(0..length as u32);
            cu_seqlens.push(sample.len());
        }
        if i32::try_from(sample.len()).is_err() {
            bail!("a batch of {} tokens is more than kernels count to", sample.len());
        }
        Ok(Self {
            starts: cu_seqlens.iter().map(|at| *at as i32).collect::<Vec<_>>().into(),
            tiles: OnceLock::new(),
            cu_seqlens,
            rows: RowIds { sample: sample.into(), position: position.into() },
            sequences: RowIds {
                sample: sample_ids.to_vec().into(),
                position: vec![0; sample_ids.len()].into(),
            },
        })
    }

    /// Number of sequences, B.
    pub fn sequences(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.rows.sample.len()
    }

    /// Where each sequence begins, and T at the end: B + 1 numbers.
    pub fn cu_seqlens(&self) -> &[usize] {
        &self.cu_seqlens
    }

    /// [`cu_seqlens`](Self::cu_seqlens) as kernels take it.
    pub fn starts(&self) -> &Mirror<i32> {
        &self.starts
    }

    /// (sequence, first row in it) of every tile of [`TILE`] rows: what blocks of attention take.
    pub fn tiles(&self) -> &Mirror<[i32; 2]> {
        self.tiles.get_or_init(|| {
            let of = |s: usize| {
                (0..self.range(s).len()).step_by(TILE).map(move |row| [s as i32, row as i32])
            };
            (0..self.sequences()).flat_map(of).collect::<Vec<_>>().into()
        })
    }

    /// The rows of sequence `i`.
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.cu_seqlens[i]..self.cu_seqlens[i + 1]
    }

    /// Global sample id of sequence `i`.
    pub fn sample(&self, i: usize) -> u32 {
        self.sequences.sample[i]
    }

    /// Keys of `[T, _]` activations.
    pub fn token_rows(&self) -> &RowIds {
        &self.rows
    }

    /// Keys of `[B, _]` activations (pooled: position 0).
    pub fn sequence_rows(&self) -> &RowIds {
        &self.sequences
    }
}

impl RowIds {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.sample.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.sample.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_know_their_sample_and_position() -> Result<()> {
        let ragged = Ragged::new(&[2, 3], &[7, 9])?;
        assert_eq!(ragged.cu_seqlens(), [0, 2, 5]);
        assert_eq!(*ragged.token_rows().sample, [7, 7, 9, 9, 9]);
        assert_eq!(*ragged.token_rows().position, [0, 1, 0, 1, 2]);
        assert!(Ragged::new(&[2, 0], &[1, 2]).is_err());
        Ok(())
    }
}
