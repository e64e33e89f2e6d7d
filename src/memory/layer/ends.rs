//! Below and above the blocks: embeddings, learnt rows, the head.

use super::{
    linear::{Linear, Norm, Saved, SavedNorm, Trained},
    words::{Pooling, SavedPool},
};
use crate::{
    memory::{
        kernels::{Machine, Ragged},
        ledger::Held,
    },
    model::plan::{EmbeddingsPlan, HeadPlan, RowsPlan},
};

/// `embeddings::Embeddings`.
#[derive(Clone, Debug)]
pub struct Embeddings {
    width: usize,
    vocabulary: usize,
    words_train: bool,
    /// Rows of those beside the words that train.
    small_tables: Vec<usize>,
    projection: Option<Linear>,
    norm: Option<Norm>,
    drops: bool,
}

/// `embeddings::Saved`.
#[derive(Debug)]
pub struct SavedEmbeddings {
    _projection: Option<Saved>,
    _norm: Option<SavedNorm>,
}

/// `embeddings::Gradients`.
pub struct Gradients {
    /// Of the word table's rows, as if all tokens differed.
    pub words: Option<Held>,
    /// Of the virtual tokens.
    pub prompt: Option<Held>,
}

impl Embeddings {
    /// The embeddings of `plan`.
    pub fn new(plan: &EmbeddingsPlan, trained: &Trained, drops: bool) -> Self {
        let tables = plan.positions.iter().chain(&plan.types);
        let training = tables.filter(|table| trained.contains(&table.name));
        Self {
            width: plan.width,
            vocabulary: plan.words.rows,
            words_train: trained.contains(&plan.words.name),
            small_tables: training.map(|table| table.rows).collect(),
            projection: plan.projection.as_ref().map(|plan| Linear::new(plan, trained, drops)),
            norm: plan.norm.as_ref().map(|plan| Norm::new(plan, trained)),
            drops: drops && plan.dropout > 0.0,
        }
    }

    /// Columns of the tables.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Whether the word table trains.
    pub fn words_train(&self) -> bool {
        self.words_train
    }

    /// Rows of the word table that `tokens` can name.
    pub fn named(&self, tokens: usize) -> usize {
        tokens.min(self.vocabulary)
    }

    /// Whether anything beside the word table trains.
    pub fn rest_trains(&self) -> bool {
        !self.small_tables.is_empty()
            || self.projection.as_ref().is_some_and(Linear::trains)
            || self.norm.is_some_and(Norm::trains)
    }

    /// Its norm.
    pub fn norm(&self) -> Option<Norm> {
        self.norm
    }

    /// Columns of what it makes.
    fn outputs(&self) -> usize {
        self.projection.as_ref().map_or(self.width, Linear::outputs)
    }

    /// `x`, and what backward needs.
    pub fn forward(&self, machine: &Machine, ragged: Ragged) -> (Held, SavedEmbeddings) {
        let rows = ragged.tokens();
        let mut x = machine.tensor(rows, self.width);
        let mut saved = SavedEmbeddings { _projection: None, _norm: None };
        if let Some(projection) = &self.projection {
            let (y, kept) = projection.forward(machine, &x, rows);
            (x, saved._projection) = (y, Some(kept));
        }
        if let Some(norm) = self.norm {
            let (y, moments) = norm.forward(machine, rows);
            (x, saved._norm) = (y, Some(moments));
        }
        let dropped = machine.dropout(&x, (rows, self.outputs()), self.drops);
        (dropped, saved)
    }

    /// The gradients of the word table, and of `prompt` rows.
    pub fn backward(
        &self,
        machine: &Machine,
        dy: &Held,
        ragged: Ragged,
        prompt: Option<usize>,
    ) -> Gradients {
        let rows = ragged.tokens();
        let mut dx = machine.dropout(dy, (rows, self.outputs()), self.drops);
        if let Some(norm) = self.norm {
            dx = norm.backward(machine, rows, false, false).0;
        }
        if let Some(projection) = &self.projection {
            projection.backward_bias(machine, rows);
            dx = projection.backward(machine, rows);
        }
        for table in &self.small_tables {
            machine.dense_rows(rows.min(*table), self.width);
        }
        let named = self.named(rows);
        let words = self.words_train.then(|| machine.sparse_rows(named, self.width));
        let prompt = prompt.map(|prompt| {
            let gradient = machine.numbers(prompt * self.width);
            machine.dense_rows(prompt, self.width);
            gradient
        });
        drop(dx);
        Gradients { words, prompt }
    }
}

/// `rows::LearntRows`: a table, and the network that makes rows of it.
#[derive(Clone, Debug)]
pub struct Rows {
    count: usize,
    width: usize,
    /// Columns of each direction of an LSTM's layers.
    lstm: Vec<usize>,
    /// Each linear layer, and whether an activation follows it.
    layers: Vec<(Linear, bool)>,
}

/// `rows::Saved`.
#[derive(Debug)]
pub struct SavedRows {
    _layers: Vec<(Saved, Held)>,
    _lstm: Vec<Held>,
}

impl Rows {
    /// The rows of `plan`.
    pub fn new(plan: &RowsPlan, trained: &Trained, drops: bool) -> Self {
        let layers = plan.layers.iter();
        let lstm = plan.lstm.iter().flat_map(|lstm| vec![lstm.hidden_size; lstm.num_layers]);
        Self {
            count: plan.rows,
            width: plan.width,
            lstm: lstm.collect(),
            layers: layers
                .map(|(linear, activation)| {
                    (Linear::new(linear, trained, drops), activation.is_some())
                })
                .collect(),
        }
    }

    /// n.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Columns of the rows.
    pub fn outputs(&self) -> usize {
        self.layers.last().map_or(self.width, |(linear, _)| linear.outputs())
    }

    /// The rows, and what backward needs. An LSTM's layer keeps its gates, cells and outputs of both directions.
    pub fn forward(&self, machine: &Machine) -> (Held, SavedRows) {
        let n = self.count;
        let of_lstm = |hidden: &usize| machine.tensor(n, 2 * 6 * hidden).saved();
        let mut saved =
            SavedRows { _layers: Vec::new(), _lstm: self.lstm.iter().map(of_lstm).collect() };
        // The table itself.
        let mut x = machine.tensor(0, 0);
        for (linear, activates) in &self.layers {
            let (h, kept) = linear.forward(machine, &x, n);
            x = if *activates { machine.tensor(n, linear.outputs()) } else { h.clone() };
            saved._layers.push((kept, h.saved()));
        }
        (x, saved)
    }

    /// Adds the gradients of table and network.
    pub fn backward(&self, machine: &Machine) {
        let n = self.count;
        let mut dx = machine.tensor(0, 0);
        for (linear, activates) in self.layers.iter().rev() {
            let d_product = match activates {
                true => machine.activation_backward(n, linear.outputs(), linear.bias_trains()),
                false => dx.clone(),
            };
            linear.backward_bias(machine, n);
            dx = linear.backward(machine, n);
            drop(d_product);
        }
        let _sum = machine.numbers(n * self.width);
        drop(dx);
    }
}

/// `head::Head`.
#[derive(Clone, Debug)]
pub struct Head {
    /// Columns of the rows that it pools.
    width: usize,
    pool: Pooling,
    dense: Option<Linear>,
    norm: Option<Norm>,
    classifier: Linear,
    input_drops: bool,
    output_drops: bool,
}

/// `head::Saved`.
#[derive(Debug)]
pub struct SavedHead {
    _pool: SavedPool,
    _dense: Option<(Saved, Held)>,
    _norm: Option<SavedNorm>,
    _classifier: Saved,
}

impl Head {
    /// The head of `plan` over `width` columns.
    pub fn new(plan: &HeadPlan, width: usize, trained: &Trained, drops: bool) -> Self {
        let linear = |plan| Linear::new(plan, trained, drops);
        Self {
            width,
            pool: Pooling::new(&plan.pool, trained, drops),
            dense: plan.dense.as_ref().map(|(dense, _)| linear(dense)),
            norm: plan.norm.as_ref().map(|plan| Norm::new(plan, trained)),
            classifier: linear(&plan.classifier),
            input_drops: drops && plan.input_dropout > 0.0,
            output_drops: drops && plan.output_dropout > 0.0,
        }
    }

    /// Its norm.
    pub fn norm(&self) -> Option<Norm> {
        self.norm
    }

    /// Logits, and what backward needs.
    pub fn forward(&self, machine: &Machine, x: &Held, ragged: Ragged) -> (Held, SavedHead) {
        let rows = ragged.sequences;
        let width = self.pool.outputs(self.width);
        let (pooled, pool) = self.pool.forward(machine, x, ragged, self.width);
        let mut features = machine.dropout(&pooled, (rows, width), self.input_drops);
        let (mut dense, mut moments) = (None, None);
        if let Some(linear) = &self.dense {
            let (h, saved) = linear.forward(machine, &features, rows);
            features = machine.tensor(rows, linear.outputs());
            dense = Some((saved, h.saved()));
        }
        if let Some(norm) = self.norm {
            let (y, saved) = norm.forward(machine, rows);
            (features, moments) = (y, Some(saved));
        }
        let dropped = machine.dropout(&features, (rows, width), self.output_drops);
        let (logits, classifier) = self.classifier.forward(machine, &dropped, rows);
        (logits, SavedHead { _pool: pool, _dense: dense, _norm: moments, _classifier: classifier })
    }

    /// The gradient of the encoder's output, unless nothing below trains.
    pub fn backward(&self, machine: &Machine, ragged: Ragged, input_trains: bool) -> Option<Held> {
        let below = input_trains || self.pool.learns();
        let (rows, width) = (ragged.sequences, self.pool.outputs(self.width));
        self.classifier.backward_bias(machine, rows);
        let mut dx = self.classifier.backward(machine, rows);
        dx = machine.dropout(&dx, (rows, width), self.output_drops);
        if let Some(norm) = self.norm {
            dx = norm.backward(machine, rows, false, false).0;
        }
        if let Some(dense) = &self.dense {
            let _dh = machine.activation_backward(rows, dense.outputs(), dense.bias_trains());
            if !below {
                dense.backward_into(machine, None, rows);
                return None;
            }
            dx = dense.backward(machine, rows);
        }
        if !below {
            return None;
        }
        let _dropped = machine.dropout(&dx, (rows, width), self.input_drops);
        Some(self.pool.backward(machine, ragged, self.width))
    }
}
