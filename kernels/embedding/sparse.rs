//! Rows of a large table's gradient: which, and their values.

use candle_core::{DType, Device, Result, Tensor};

#[cfg(device)]
use super::device;
use super::{check_rows, cpu};
use crate::common::run;

/// The gradient of a `[V, width]` table where only some rows are not zero. Ids are ascending and
/// unique; they are the host's, the values stay on the device that made them.
#[derive(Clone, Debug)]
pub struct SparseRows {
    /// Row numbers, ascending.
    pub ids: Vec<u32>,
    /// `[ids.len() * width]` values, f32.
    pub values: Tensor,
    /// Elements of one row.
    pub width: usize,
}

/// For each row of a result, the rows of two gradients that it sums; -1 for none.
pub(super) type Sources = [i32; 2];

impl SparseRows {
    /// No rows yet.
    ///
    /// # Errors
    /// If the device fails.
    pub fn empty(width: usize, device: &Device) -> Result<Self> {
        Ok(Self { ids: Vec::new(), values: nothing(device)?, width })
    }

    /// Adds `other`, row by row.
    ///
    /// # Errors
    /// If widths or devices differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.ids.is_empty() {
            self.clone_from(other);
            return Ok(());
        }
        check_rows(self)?;
        check_rows(other)?;
        if self.width != other.width {
            candle_core::bail!("embedding: rows of {} beside rows of {}", self.width, other.width);
        }
        let (mut ids, mut from) = (Vec::new(), Vec::new());
        let (mut a, mut b) = (0, 0);
        while a < self.ids.len() || b < other.ids.len() {
            let left = self.ids.get(a).copied().unwrap_or(u32::MAX);
            let right = other.ids.get(b).copied().unwrap_or(u32::MAX);
            ids.push(left.min(right));
            from.push([
                if left <= right { a as i32 } else { -1 },
                if right <= left { b as i32 } else { -1 },
            ]);
            a += usize::from(left <= right);
            b += usize::from(right <= left);
        }
        self.values = join([&self.values, &other.values], &from, self.width)?;
        self.ids = ids;
        Ok(())
    }

    /// The same gradient with a row for each of `ids`, which are ascending, unique and include all of
    /// its own.
    ///
    /// # Errors
    /// If an id of its own is missing, or the device fails.
    pub fn spread(&self, ids: &[u32]) -> Result<Self> {
        check_rows(self)?;
        let mut next = 0;
        let place = |id: &u32| {
            let own = self.ids.get(next) == Some(id);
            next += usize::from(own);
            [if own { next as i32 - 1 } else { -1 }, -1]
        };
        let from: Vec<Sources> = ids.iter().map(place).collect();
        if next != self.ids.len() {
            candle_core::bail!("embedding: rows spread over ids that lack some of their own");
        }
        let values = join([&self.values, &self.values], &from, self.width)?;
        Ok(Self { ids: ids.to_vec(), values, width: self.width })
    }
}

fn join(values: [&Tensor; 2], from: &[Sources], width: usize) -> Result<Tensor> {
    run!("embedding", values[0], join(values, from, width))
}

/// A flat tensor without elements.
fn nothing(device: &Device) -> Result<Tensor> {
    #[cfg(device)]
    if !device.is_cpu() {
        return crate::common::device::unwritten(device, 0, DType::F32);
    }
    Tensor::zeros(0, DType::F32, device)
}
