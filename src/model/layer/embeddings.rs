//! From token ids to activations: a sum of table rows, a projection where the tables are narrower,
//! a norm, dropout. Virtual tokens take a learnt row in place of a word's.

use allreel_kernels::{
    Dropout, DropoutKey, Mirror, dropout,
    embedding::{self, Lookup, SparseRows},
    norm,
    quantized::{Int8, Quantized},
};
use candle_core::{DType, Tensor};

use super::{
    linear::{self, Linear, Rows},
    norm::Norm,
    site,
};
use crate::{
    Error, Result,
    batch::Batch,
    model::{
        parameters::{Group, Parameter, Parameters, Spec, Weight},
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
        let spec = Spec::new(plan.name.clone(), &[plan.rows, width], plan.init);
        group.specs.push(Spec { quantization: plan.quantization, ..spec });
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

/// The word table.
struct Words {
    rows: WordRows,
    padding: Option<u32>,
    /// Whether it trains.
    trains: bool,
}

enum WordRows {
    Dense(Tensor),
    /// Frozen, a scale for each row.
    Int8(Int8),
}

impl Words {
    fn new(parameters: &Parameters, plan: &TablePlan) -> Result<Self> {
        let rows = match parameters.weight(&plan.name)? {
            Weight::Dense(table) => WordRows::Dense(table.value),
            Weight::Quantized(Quantized::Int8(table)) => WordRows::Int8(table),
            Weight::Quantized(Quantized::FourBit(_)) => {
                return Err(Error::Bug("a word table in 4 bits".into()));
            }
        };
        let trains = parameters.bucket(&plan.name).is_some();
        Ok(Self { rows, padding: plan.padding, trains })
    }

    fn lookup<'a>(&'a self, ids: &'a Mirror<u32>) -> Lookup<'a> {
        match &self.rows {
            WordRows::Dense(table) => Lookup::new(table, ids),
            WordRows::Int8(table) => Lookup::new(table, ids),
        }
    }
}

/// Tables, projection and norm.
pub struct Embeddings {
    words: Words,
    positions: Option<Table>,
    types: Option<Table>,
    projection: Option<Linear>,
    norm: Option<Norm>,
    dropout: f64,
    /// Of activations.
    dtype: DType,
}

/// Gradients of tables that are not the embeddings' own to add.
pub struct Gradients {
    /// Of the word table, if it trains.
    pub words: Option<SparseRows>,
    /// Of the virtual tokens' rows, if there are any.
    pub prompt: Option<Tensor>,
}

/// What the embeddings' backward needs.
pub struct Saved {
    projection: Option<linear::Saved>,
    norm: Option<norm::Saved>,
}

impl Embeddings {
    /// The word table as one group, and the rest as another.
    pub fn declare(plan: &EmbeddingsPlan) -> [Group; 2] {
        let mut words = Group::new(&plan.words.name);
        words.table = true;
        Table::declare(&mut words, &plan.words, plan.width);
        let mut rest = Group::new(EMBEDDINGS);
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
            words: Words::new(parameters, &plan.words)?,
            positions: table(&plan.positions)?,
            types: table(&plan.types)?,
            projection: projection.transpose()?,
            norm: plan.norm.as_ref().map(|plan| Norm::new(parameters, plan)).transpose()?,
            dropout: plan.dropout,
            dtype: parameters.placement.dtype,
        })
    }

    /// The rows of the words called `ids`, as layers compute with them.
    ///
    /// # Errors
    /// If an id is outside the table.
    pub fn words(&self, ids: &Mirror<u32>) -> Result<Tensor> {
        Ok(embedding::forward(&[self.words.lookup(ids)])?)
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

    /// `[T, H]` and what backward needs; `prompt` holds the rows of virtual tokens.
    ///
    /// # Errors
    /// If an id is outside its table.
    pub fn forward(
        &self,
        batch: &Batch,
        prompt: Option<&Tensor>,
        key: Option<DropoutKey>,
    ) -> Result<(Tensor, Saved)> {
        let mut lookups = vec![self.words.lookup(&batch.tokens)];
        for (table, ids) in self.small_tables(batch) {
            lookups.push(Lookup::new(&table.rows.value, ids));
        }
        if let (Some(prompt), Some(ids)) = (prompt, &batch.prompt) {
            lookups.push(Lookup::new(prompt, ids));
        }
        let rows = Rows { ids: batch.ragged.token_rows(), key };
        // A table in 8 bits alone does not say what activations are stored as.
        let mut x = embedding::forward(&lookups)?.to_dtype(self.dtype)?;
        let mut saved = Saved { projection: None, norm: None };
        if let Some(projection) = &self.projection {
            let (y, kept) = projection.forward(&x, rows)?;
            (x, saved.projection) = (y, Some(kept));
        }
        if let Some(norm) = &self.norm {
            let (y, moments) = norm.forward(&x)?;
            (x, saved.norm) = (y, Some(moments));
        }
        let x = dropout::apply(&x, self.dropout(key).as_ref(), rows.ids)?;
        Ok((x, saved))
    }

    /// Adds the gradients of everything but the word table and `prompt`; returns those two.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        batch: &Batch,
        prompt: Option<&Tensor>,
        saved: &Saved,
        dy: &Tensor,
        key: Option<DropoutKey>,
    ) -> Result<Gradients> {
        let rows = Rows { ids: batch.ragged.token_rows(), key };
        let mut dx = dropout::apply(dy, self.dropout(key).as_ref(), rows.ids)?;
        if let (Some(norm), Some(saved)) = (&self.norm, &saved.norm) {
            dx = norm.backward(&dx, saved, None)?;
        }
        if let (Some(projection), Some(saved)) = (&self.projection, &saved.projection) {
            projection.backward_bias(&dx)?;
            dx = projection.backward(&dx, saved, rows)?;
        }
        for (table, ids) in self.small_tables(batch) {
            if let Some(gradient) = &table.rows.gradient {
                embedding::backward_dense(&dx, ids, table.padding, gradient)?;
            }
        }
        let words = || embedding::backward_sparse(&dx, &batch.tokens, self.words.padding);
        let mut gradients =
            Gradients { words: self.words.trains.then(words).transpose()?, prompt: None };
        if let (Some(prompt), Some(ids)) = (prompt, &batch.prompt) {
            let dtype = if dx.dtype() == DType::BF16 { DType::F32 } else { dx.dtype() };
            let gradient = Tensor::zeros(prompt.shape(), dtype, dx.device())?;
            embedding::backward_dense(&dx, ids, None, &gradient)?;
            gradients.prompt = Some(gradient);
        }
        Ok(gradients)
    }
}
