//! The attention of a DeBERTa block: the relative table projected to keys and queries, and the op.

use allreel_kernels::disentangled::{self, Disentangled, Gradients};
use allreel_kernels::{Dropout, Ragged};
use candle_core::Tensor;

use super::{
    Sites,
    linear::{self, Linear, Rows},
    relative::Relative,
};
use crate::{
    Result,
    model::{
        parameters::{Group, Parameters},
        plan::{DisentangledPlan, PositionProjection},
    },
};

/// What projects the relative table, for each kind of score that there is.
pub struct DisentangledAttention {
    /// To keys, for content to position.
    to_key: Option<Projection>,
    /// To queries, for position to content.
    to_query: Option<Projection>,
}

enum Projection {
    Shared,
    Own(Linear),
}

impl Projection {
    fn new(parameters: &Parameters, plan: &PositionProjection) -> Result<Self> {
        Ok(match plan {
            PositionProjection::Shared => Self::Shared,
            PositionProjection::Own(plan) => Self::Own(Linear::new(parameters, plan)?),
        })
    }

    fn linear<'a>(&'a self, shared: &'a Linear) -> &'a Linear {
        match self {
            Self::Shared => shared,
            Self::Own(linear) => linear,
        }
    }
}

/// What does not change between forward and backward.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub ragged: &'a Ragged,
    pub heads: usize,
    pub scale: f64,
    pub dropout: Option<&'a Dropout>,
    /// The block's own key projection.
    pub key: &'a Linear,
    /// The block's own query projection.
    pub query: &'a Linear,
    pub sites: Sites,
}

impl<'a> Call<'a> {
    fn op(self, relative: &'a Relative) -> Disentangled<'a> {
        let Self { ragged, heads, scale, dropout, .. } = self;
        Disentangled { ragged, heads, scale, dropout, positions: &relative.positions }
    }
}

/// What backward needs.
pub struct Saved {
    pub(super) op: disentangled::Saved,
    /// Of the projections to keys and to queries.
    projections: [Option<linear::Saved>; 2],
}

impl DisentangledAttention {
    /// Declares the projections that are not shared with content.
    pub fn declare(group: &mut Group, plan: &DisentangledPlan) {
        for projection in [&plan.content_to_position, &plan.position_to_content] {
            if let Some(PositionProjection::Own(linear)) = projection {
                Linear::declare(group, linear);
            }
        }
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &DisentangledPlan) -> Result<Self> {
        let projection = |plan: &Option<PositionProjection>| {
            plan.as_ref().map(|plan| Projection::new(parameters, plan)).transpose()
        };
        Ok(Self {
            to_key: projection(&plan.content_to_position)?,
            to_query: projection(&plan.position_to_content)?,
        })
    }

    /// What backward needs, the output `o` `[T, H]` among it.
    pub(super) fn forward(
        &self,
        call: Call<'_>,
        [q, k, v]: [Tensor; 3],
        relative: &Relative,
    ) -> Result<Saved> {
        let rows = relative.rows(call.sites)?;
        let ids = Rows { ids: &relative.ids, key: call.sites.key };
        let project = |projection: &Option<Projection>, shared| -> Result<_> {
            let Some(projection) = projection else { return Ok((None, None)) };
            let (y, saved) = projection.linear(shared).forward(&rows, ids)?;
            Ok((Some(y), Some(saved)))
        };
        let (pk, to_key) = project(&self.to_key, call.key)?;
        let (pq, to_query) = project(&self.to_query, call.query)?;
        let op = call.op(relative);
        let (o, lse) = disentangled::forward(op, &q, &k, &v, pk.as_ref(), pq.as_ref())?;
        let op = disentangled::Saved { q, k, v, pk, pq, o, lse };
        Ok(Saved { op, projections: [to_key, to_query] })
    }

    /// Whether a projection of its own trains.
    pub fn trains(&self) -> bool {
        [&self.to_key, &self.to_query]
            .into_iter()
            .flatten()
            .any(|p| matches!(p, Projection::Own(linear) if linear.trains()))
    }

    /// `[dq, dk, dv]`; adds the gradients of the projections and of the relative rows.
    pub(super) fn backward(
        &self,
        call: Call<'_>,
        saved: &Saved,
        d_o: &Tensor,
        relative: &mut Relative,
    ) -> Result<[Tensor; 3]> {
        let projections = [(&self.to_key, call.key), (&self.to_query, call.query)]
            .map(|(projection, shared)| projection.as_ref().map(|p| p.linear(shared)));
        let wanted = relative.trains || projections.iter().flatten().any(|linear| linear.trains());
        let Gradients { q, k, v, pk, pq } =
            disentangled::backward(call.op(relative), &saved.op, d_o, wanted)?;
        let mut d_rows: Option<Tensor> = None;
        let ids = Rows { ids: &relative.ids, key: call.sites.key };
        for ((linear, saved), dy) in projections.into_iter().zip(&saved.projections).zip([pk, pq]) {
            let (Some(linear), Some(saved), Some(dy)) = (linear, saved, dy) else { continue };
            linear.backward_bias(&dy)?;
            d_rows = match d_rows {
                None if relative.trains => Some(linear.backward(&dy, saved, ids)?),
                d_rows => linear.backward_into(&dy, saved, ids, d_rows)?,
            };
        }
        if let Some(d_rows) = d_rows {
            relative.add_gradient(&d_rows, call.sites)?;
        }
        Ok([q, k, v])
    }
}
