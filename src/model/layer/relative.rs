//! DeBERTa's table of relative positions: normed once for a pass, dropped anew in every block, its
//! gradient the sum of what all blocks make.

use allreel_kernels::{
    Dropout, Ragged, RowIds,
    disentangled::Positions,
    dropout, embedding,
    norm::{self, Junction},
};
use candle_core::{DType, Tensor};

use super::{Sites, norm::Norm, site};
use crate::{
    Result,
    model::{
        parameters::{Group, Parameter, Parameters, Spec},
        plan::RelativePlan,
    },
};

/// The group of the table and its norm.
pub const RELATIVE: &str = "relative positions";

/// The table and its norm.
pub struct RelativeTable {
    table: Parameter,
    norm: Option<Norm>,
    buckets: Option<usize>,
    max_relative: usize,
    dropout: f64,
}

/// The rows that the sequences of one batch can touch, as every block of a pass sees them.
pub struct Relative {
    /// Which distance takes which row.
    pub positions: Positions,
    /// `[R, H]` after the norm, before dropout.
    rows: Tensor,
    /// Key of the dropout of each row: the same in every batch of a step.
    pub(super) ids: RowIds,
    norm: Option<norm::Saved>,
    dropout: f64,
    /// Sum of the blocks' gradients so far; f32 where these are bf16, for there may be 48.
    gradient: Option<Tensor>,
    /// Whether the table or its norm trains.
    pub trains: bool,
}

impl RelativeTable {
    /// The group of the table and its norm.
    pub fn declare(plan: &RelativePlan, width: usize) -> Group {
        let mut group = Group::new(RELATIVE);
        group.specs.push(Spec::new(plan.name.clone(), &[plan.rows(), width], plan.init));
        if let Some(norm) = &plan.norm {
            Norm::declare(&mut group, norm);
        }
        group
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &RelativePlan) -> Result<Self> {
        Ok(Self {
            table: parameters.get(&plan.name)?,
            norm: plan.norm.as_ref().map(|norm| Norm::new(parameters, norm)).transpose()?,
            buckets: plan.buckets,
            max_relative: plan.max_relative,
            dropout: plan.dropout,
        })
    }

    /// The rows for a batch.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, ragged: &Ragged) -> Result<Relative> {
        let longest = (0..ragged.sequences()).map(|i| ragged.range(i).len()).max().unwrap_or(1);
        let positions = Positions::new(self.buckets, self.max_relative, longest);
        let range = positions.rows();
        let mut rows = self.table.value.narrow(0, range.start, range.len())?;
        let mut saved = None;
        if let Some(norm) = &self.norm {
            let (y, moments) = norm.forward(&rows)?;
            (rows, saved) = (y, Some(moments));
        }
        let ids = RowIds {
            // No sample has this id: the table belongs to all of them.
            sample: vec![u32::MAX; range.len()].into(),
            position: range.map(|row| row as u32).collect::<Vec<_>>().into(),
        };
        let trains = self.table.gradient.is_some() || self.norm.as_ref().is_some_and(Norm::trains);
        let dropout = self.dropout;
        Ok(Relative { positions, rows, ids, norm: saved, dropout, gradient: None, trains })
    }

    /// Adds the gradients of table and norm, if they train.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, relative: &Relative) -> Result<()> {
        let Some(d_rows) = &relative.gradient else { return Ok(()) };
        let mut d_rows = d_rows.to_dtype(relative.rows.dtype())?;
        if let (Some(norm), Some(saved)) = (&self.norm, &relative.norm) {
            d_rows = norm.backward(&d_rows, saved, None)?;
        }
        if let Some(gradient) = &self.table.gradient {
            embedding::backward_dense(&d_rows, &relative.ids.position, None, gradient)?;
        }
        Ok(())
    }
}

impl Relative {
    fn dropout(&self, sites: Sites) -> Option<Dropout> {
        sites.dropout(self.dropout, site::RELATIVE)
    }

    /// The rows as the block at `sites` sees them, `[R, H]`.
    pub(super) fn rows(&self, sites: Sites) -> Result<Tensor> {
        Ok(dropout::apply(&self.rows, self.dropout(sites).as_ref(), &self.ids)?)
    }

    /// Adds what the block at `sites` makes of the gradient.
    pub(super) fn add_gradient(&mut self, d_rows: &Tensor, sites: Sites) -> Result<()> {
        let dropout = self.dropout(sites);
        if d_rows.dtype() == DType::BF16 {
            let own = dropout::apply(d_rows, dropout.as_ref(), &self.ids)?.to_dtype(DType::F32)?;
            self.gradient = Some(match &self.gradient {
                None => own,
                Some(sum) => (sum + own)?,
            });
            return Ok(());
        }
        self.gradient = Some(match &self.gradient {
            None => dropout::apply(d_rows, dropout.as_ref(), &self.ids)?,
            Some(sum) => norm::add(
                d_rows,
                Junction {
                    dropout: dropout.as_ref().map(|dropout| (dropout, &self.ids)),
                    residual: Some(sum),
                    ..Junction::default()
                },
            )?,
        });
        Ok(())
    }
}
