//! From token ids to activations: a sum of table rows, a projection where the tables are narrower,
//! a norm, dropout.

use allreel_kernels::{
    Dropout, DropoutKey, Mirror, dropout,
    embedding::{self, Lookup, SparseRows},
    norm,
};
use candle_core::Tensor;

use super::{linear::Linear, norm::Norm, site};
use crate::{
    Result,
    batch::Batch,
    model::{
        parameters::{Group, Parameter, Parameters, Spec},
        plan::{EmbeddingsPlan, TablePlan},
    },
};

/// The group of all parameters but the word table.
pub const EMBEDDINGS: &str = "embeddings";

/// A table of which ids name rows.
struct Table {
    /// Rows from that of id 0 on.
    rows: Parameter,
    padding: Option<u32>,
}

impl Table {
    fn declare(group: &mut Group, plan: &TablePlan, width: usize) {
        group.specs.push(Spec::new(plan.name.clone(), &[plan.rows, width], plan.init));
    }

    fn new(parameters: &Parameters, plan: &TablePlan) -> Result<Self> {
        let whole = parameters.get(&plan.name)?;
        let from_id_0 = |table: &Tensor| table.narrow(0, plan.offset, plan.rows - plan.offset);
        let rows = Parameter {
            value: from_id_0(&whole.value)?,
            gradient: whole.gradient.as_ref().map(from_id_0).transpose()?,
        };
        Ok(Self { rows, padding: plan.padding })
    }
}

/// Tables, projection and norm.
pub struct Embeddings {
    words: Table,
    positions: Option<Table>,
    types: Option<Table>,
    projection: Option<Linear>,
    norm: Option<Norm>,
    dropout: f64,
}

/// What the embeddings' backward needs.
pub struct Saved {
    /// The sum of rows, where a projection reads it.
    sum: Option<Tensor>,
    norm: Option<norm::Saved>,
}

impl Embeddings {
    /// The word table as one group, and the rest as another.
    pub fn declare(plan: &EmbeddingsPlan, trains: bool) -> [Group; 2] {
        let mut words = Group::new(&plan.words.name, trains);
        words.table = true;
        Table::declare(&mut words, &plan.words, plan.width);
        let mut rest = Group::new(EMBEDDINGS, trains);
        for table in plan.positions.iter().chain(&plan.types) {
            Table::declare(&mut rest, table, plan.width);
        }
        if let Some(projection) = &plan.projection {
            Linear::declare(&mut rest, projection);
        }
        if let Some(norm) = &plan.norm {
            Norm::declare(&mut rest, norm);
        }
        [words, rest]
    }

    /// Takes the declared parameters.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, plan: &EmbeddingsPlan) -> Result<Self> {
        let table = |plan: &Option<TablePlan>| {
            plan.as_ref().map(|plan| Table::new(parameters, plan)).transpose()
        };
        let projection = plan.projection.as_ref().map(|plan| Linear::new(parameters, plan));
        Ok(Self {
            words: Table::new(parameters, &plan.words)?,
            positions: table(&plan.positions)?,
            types: table(&plan.types)?,
            projection: projection.transpose()?,
            norm: plan.norm.as_ref().map(|plan| Norm::new(parameters, plan)).transpose()?,
            dropout: plan.dropout,
        })
    }

    fn dropout(&self, key: Option<DropoutKey>) -> Option<Dropout> {
        Dropout::new(self.dropout, key?, site::EMBEDDINGS)
    }

    /// The tables beside the words, with the ids that they are asked for.
    fn small_tables<'a>(
        &'a self,
        batch: &'a Batch,
    ) -> impl Iterator<Item = (&'a Table, &'a Mirror<u32>)> {
        let positions = &batch.ragged.token_rows().position;
        let positions = self.positions.as_ref().map(|table| (table, positions));
        let types = self.types.as_ref().map(|table| (table, &batch.token_types));
        positions.into_iter().chain(types)
    }

    /// `[T, H]` and what backward needs.
    ///
    /// # Errors
    /// If an id is outside its table.
    pub fn forward(&self, batch: &Batch, key: Option<DropoutKey>) -> Result<(Tensor, Saved)> {
        let mut lookups = vec![Lookup::new(&self.words.rows.value, &batch.tokens)];
        for (table, ids) in self.small_tables(batch) {
            lookups.push(Lookup::new(&table.rows.value, ids));
        }
        let sum = embedding::forward(&lookups)?;
        let (mut x, sum) = match &self.projection {
            Some(projection) => (projection.forward(&sum)?, Some(sum)),
            None => (sum, None),
        };
        let mut saved = Saved { sum, norm: None };
        if let Some(norm) = &self.norm {
            let (y, moments) = norm.forward(&x)?;
            (x, saved.norm) = (y, Some(moments));
        }
        let x = dropout::apply(&x, self.dropout(key).as_ref(), batch.ragged.token_rows())?;
        Ok((x, saved))
    }

    /// Adds the gradients of everything but the word table; returns that of the word table.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        batch: &Batch,
        saved: &Saved,
        dy: &Tensor,
        key: Option<DropoutKey>,
    ) -> Result<SparseRows> {
        let rows = batch.ragged.token_rows();
        let mut dx = dropout::apply(dy, self.dropout(key).as_ref(), rows)?;
        if let (Some(norm), Some(saved)) = (&self.norm, &saved.norm) {
            dx = norm.backward(&dx, saved, None)?;
        }
        if let (Some(projection), Some(sum)) = (&self.projection, &saved.sum) {
            projection.backward_parameters(&dx, sum)?;
            dx = projection.backward_input(&dx)?;
        }
        for (table, ids) in self.small_tables(batch) {
            if let Some(gradient) = &table.rows.gradient {
                embedding::backward_dense(&dx, ids, table.padding, gradient)?;
            }
        }
        Ok(embedding::backward_sparse(&dx, &batch.tokens, self.words.padding)?)
    }
}
