//! The solver's state in a checkpoint: `optimizer.safetensors`, all in f64.

use std::path::Path;

use crate::{
    Error, Result,
    linear::{
        arrays::{Array, Arrays, write_arrays},
        lbfgs::{History, Lbfgs},
    },
};

const FILE: &str = "optimizer.safetensors";

/// Writes it.
pub(super) fn save(dir: &Path, solver: &Lbfgs) -> Result<()> {
    let pairs = [solver.history.len() as u64];
    let mut arrays = vec![
        ("point".to_owned(), Array::of(&solver.point)),
        ("pairs".to_owned(), Array::of(&pairs)),
    ];
    for (i, (step, change)) in solver.history.iter().enumerate() {
        arrays.push((format!("step.{i}"), Array::of(step)));
        arrays.push((format!("change.{i}"), Array::of(change)));
    }
    write_arrays(&dir.join(FILE), &arrays)
}

/// Reads back the point and the history, of a problem with `length` unknowns: the gradient there is computed.
pub(super) fn load(dir: &Path, length: usize) -> Result<(Vec<f64>, History)> {
    let path = dir.join(FILE);
    let arrays = Arrays::read(&path)?;
    let vector = |name: &str| match arrays.get::<f64>(name)? {
        vector if vector.len() == length => Ok(vector),
        _ => Err(Error::Data(format!(
            "checkpoint {} does not fit this model: {name}",
            dir.display()
        ))),
    };
    let pairs = arrays.get::<u64>("pairs")?.first().copied().unwrap_or(0);
    let pair = |i| Ok((vector(&format!("step.{i}"))?, vector(&format!("change.{i}"))?));
    Ok((vector("point")?, (0..pairs).map(pair).collect::<Result<_>>()?))
}
