//! What blocks share, and their attention.

use allreel_kernels::{attention::Span, disentangled::Positions};

use super::{
    ends::{Rows, SavedRows},
    linear::{Linear, Norm, Saved, SavedNorm, Trained},
};
use crate::{
    memory::{
        kernels::{Heads, Machine, Ragged},
        ledger::Held,
    },
    model::plan::{DisentangledPlan, PositionProjection, RelativePlan},
};

/// `relative::RelativeTable`.
#[derive(Clone, Debug)]
pub struct RelativeTable {
    buckets: Option<usize>,
    max_relative: usize,
    width: usize,
    norm: Option<Norm>,
    drops: bool,
    trains: bool,
}

/// `relative::Relative`: the rows of one pass.
#[derive(Debug)]
pub struct Relative {
    /// R.
    pub count: usize,
    width: usize,
    rows: Held,
    _norm: Option<SavedNorm>,
    drops: bool,
    gradient: Option<Held>,
    trains: bool,
}

impl RelativeTable {
    /// The table of `plan`, `[_, width]`.
    pub fn new(plan: &RelativePlan, width: usize, trained: &Trained, drops: bool) -> Self {
        let norm = plan.norm.as_ref().map(|norm| Norm::new(norm, trained));
        Self {
            buckets: plan.buckets,
            max_relative: plan.max_relative,
            width,
            norm,
            drops: drops && plan.dropout > 0.0,
            trains: trained.contains(&plan.name) || norm.is_some_and(Norm::trains),
        }
    }

    /// Whether anything of it trains.
    pub fn trains(&self) -> bool {
        self.trains
    }

    /// Its norm.
    pub fn norm(&self) -> Option<Norm> {
        self.norm
    }

    /// The rows for sequences of `length` tokens.
    pub fn forward(&self, machine: &Machine, length: usize) -> Relative {
        let count = Positions::new(self.buckets, self.max_relative, length).rows().len();
        let (rows, norm) = match self.norm {
            Some(norm) => {
                let (rows, saved) = norm.forward(machine, count);
                (rows.saved(), Some(saved))
            }
            // A view of the table.
            None => (machine.tensor(0, 0), None),
        };
        let Self { width, drops, trains, .. } = *self;
        Relative { count, width, rows, _norm: norm, drops, gradient: None, trains }
    }

    /// The gradients of table and norm.
    pub fn backward(&self, machine: &Machine, relative: &Relative) {
        if relative.gradient.is_none() {
            return;
        }
        let rounded = machine.cuda.then(|| machine.tensor(relative.count, self.width));
        let normed = self.norm.map(|norm| norm.backward(machine, relative.count, false, false));
        machine.dense_rows(relative.count, self.width);
        drop((rounded, normed));
    }
}

impl Relative {
    /// The rows as a block sees them.
    fn rows(&self, machine: &Machine) -> Held {
        machine.dropout(&self.rows, (self.count, self.width), self.drops)
    }

    /// Adds what a block makes of the gradient.
    fn add_gradient(&mut self, machine: &Machine, d_rows: Held) {
        let shape = (self.count, self.width);
        self.gradient = Some(match (machine.cuda, self.gradient.is_none()) {
            (true, first) => {
                let dropped = machine.dropout(&d_rows, shape, self.drops);
                let own = machine.numbers(shape.0 * shape.1);
                drop(dropped);
                if first { own } else { machine.numbers(shape.0 * shape.1) }
            }
            (false, true) => machine.dropout(&d_rows, shape, self.drops),
            (false, false) => machine.tensor(shape.0, shape.1),
        });
    }
}

/// `prefix::Prefixes`: the keys and values of every block, and their gradients.
#[derive(Debug)]
pub struct Prefixes {
    n: usize,
    _blocks: Vec<Held>,
    gradients: Vec<[Held; 2]>,
    _saved: SavedRows,
}

impl Prefixes {
    /// Those of `blocks` blocks of `width` columns, of one pass.
    pub fn new(machine: &Machine, rows: &Rows, (blocks, width): (usize, usize)) -> Self {
        let (whole, saved) = rows.forward(machine);
        let n = rows.count();
        let blocks = (0..2 * blocks).map(|_| machine.tensor(n, width).saved()).collect();
        drop(whole);
        Self { n, _blocks: blocks, gradients: Vec::new(), _saved: saved }
    }

    /// The gradients of the rows, when every block has run backward.
    pub fn finish(&self, machine: &Machine, rows: &Rows) {
        let width = rows.outputs();
        let _joined = machine.numbers(self.n * width);
        rows.backward(machine);
    }
}

/// `block::Shared`.
#[derive(Debug, Default)]
pub struct Shared {
    /// DeBERTa's relative positions.
    pub relative: Option<Relative>,
    /// Learnt keys and values.
    pub prefix: Option<Prefixes>,
}

impl Shared {
    /// Whether any of it trains.
    pub fn train(&self) -> bool {
        self.prefix.is_some() || self.relative.as_ref().is_some_and(|relative| relative.trains)
    }
}

/// The attention of a block: plain, or disentangled with these projections (its own, or shared with content).
#[derive(Clone, Debug)]
pub struct Attention {
    /// Heads.
    pub heads: Heads,
    /// Which keys a query sees.
    pub span: Span,
    /// DeBERTa's scores by relative position.
    pub positions: Option<Vec<Projection>>,
}

/// `disentangled::Projection`.
#[derive(Clone, Debug)]
pub struct Projection {
    linear: Linear,
    own: bool,
}

impl Projection {
    /// Those of a block whose content goes through `key` and `query`.
    pub fn all(
        plan: &DisentangledPlan,
        [key, query]: [&Linear; 2],
        trained: &Trained,
        drops: bool,
    ) -> Vec<Self> {
        let kinds = [(&plan.content_to_position, key), (&plan.position_to_content, query)];
        let projection = |(plan, shared): (&Option<PositionProjection>, &Linear)| {
            plan.as_ref().map(|plan| match plan {
                PositionProjection::Shared => Self { linear: shared.clone(), own: false },
                PositionProjection::Own(plan) => {
                    Self { linear: Linear::new(plan, trained, drops), own: true }
                }
            })
        };
        kinds.into_iter().filter_map(projection).collect()
    }
}

/// `attention::Saved` or `disentangled::Saved`.
#[derive(Debug)]
pub struct SavedAttention {
    _qkv: [Held; 3],
    o: [Held; 2],
    _tables: Vec<(Held, Saved)>,
}

impl SavedAttention {
    /// The attention's output.
    pub fn o(&self) -> &Held {
        &self.o[0]
    }
}

impl Attention {
    /// Whether a projection of its own trains.
    pub fn trains(&self) -> bool {
        self.positions
            .iter()
            .flatten()
            .any(|projection| projection.own && projection.linear.trains())
    }

    /// From queries, keys and values to what backward needs, the output among it.
    pub fn forward(
        &self,
        machine: &Machine,
        ragged: Ragged,
        qkv: [Held; 3],
        shared: &Shared,
    ) -> SavedAttention {
        let (mut o, tables) = match (&self.positions, &shared.relative) {
            (Some(projections), Some(relative)) => {
                let rows = relative.rows(machine);
                let tables: Vec<(Held, Saved)> = projections
                    .iter()
                    .map(|projection| {
                        let (y, saved) = projection.linear.forward(machine, &rows, relative.count);
                        (y.saved(), saved)
                    })
                    .collect();
                let shape = (projections.len(), relative.count);
                (machine.disentangled(ragged, self.heads, shape), tables)
            }
            _ => (machine.attention(ragged, self.heads, self.span), Vec::new()),
        };
        if let Some(prefix) = &shared.prefix {
            o = machine.prefix(ragged, self.heads, prefix.n);
        }
        let [q, k, v] = &qkv;
        let [o, lse] = &o;
        SavedAttention {
            _qkv: [q.saved(), k.saved(), v.saved()],
            o: [o.saved(), lse.saved()],
            _tables: tables,
        }
    }

    /// `[dq, dk, dv]`; adds to the gradients of what blocks share.
    pub fn backward(&self, machine: &Machine, ragged: Ragged, shared: &mut Shared) -> [Held; 3] {
        let gradients = match (&self.positions, &mut shared.relative) {
            (Some(projections), Some(relative)) => {
                self.disentangled_backward(machine, ragged, projections, relative)
            }
            _ => machine.attention_backward(ragged, self.heads, self.span),
        };
        if let Some(prefix) = &mut shared.prefix {
            prefix.gradients.push(machine.prefix_backward(ragged, self.heads, prefix.n));
        }
        gradients
    }

    fn disentangled_backward(
        &self,
        machine: &Machine,
        ragged: Ragged,
        projections: &[Projection],
        relative: &mut Relative,
    ) -> [Held; 3] {
        let wanted = relative.trains || projections.iter().any(|p| p.linear.trains());
        let shape = (projections.len(), relative.count);
        let (gradients, tables) = machine.disentangled_backward(ragged, self.heads, shape, wanted);
        let mut d_rows = None;
        for (projection, _dy) in projections.iter().zip(tables) {
            let linear = &projection.linear;
            linear.backward_bias(machine, relative.count);
            d_rows = match d_rows {
                None if relative.trains => Some(linear.backward(machine, relative.count)),
                d_rows => linear.backward_into(machine, d_rows, relative.count),
            };
        }
        if let Some(d_rows) = d_rows {
            relative.add_gradient(machine, d_rows);
        }
        gradients
    }
}
