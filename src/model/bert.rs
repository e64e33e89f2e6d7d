//! The BERT encoder (Devlin et al. 2019), post-LN, on ragged batches.
//!
//! ```text
//! embeddings  word + position + token type -> LN -> dropout
//! block       x -> q, k, v -> attention -> dense -> dropout -> LN(x + .) = a
//!             a -> dense -> act -> dense -> dropout -> LN(a + .)
//! ```
//!
//! Every layer is a pair: forward returns what backward needs, backward consumes it. Parameters
//! carry the names of `BertForSequenceClassification`.

use allreel_kernels::{
    Dropout, DropoutKey, Ragged, RowIds,
    activation::{self, Activation},
    attention::{self, Attention, Span},
    dropout,
    embedding::{self, Lookup, SparseRows},
    norm::{self, Gradients, Junction},
};
use candle_core::Tensor;

use super::{
    config::BertConfig,
    linear::Linear,
    parameters::{Group, Init, Parameter, Parameters, Spec},
};
use crate::{Result, batch::Batch};

/// The prefix of the encoder's parameters.
pub const PREFIX: &str = "bert.";
/// The group (and only parameter) of the word table.
pub const WORDS: &str = "bert.embeddings.word_embeddings.weight";
/// The group of the other embeddings.
pub const EMBEDDINGS: &str = "bert.embeddings";

/// Dropout sites: one number per place in the network, part of the random key (and therefore of
/// what a resumed run reproduces: do not renumber).
const SITE_EMBEDDINGS: u16 = 0;
/// Dropout site of the head.
pub(super) const SITE_HEAD: u16 = 1;
const SITE_FIRST_LAYER: u16 = 16;
const SITES_PER_LAYER: u16 = 8;

/// Name of the group of block `i`.
pub fn layer_name(i: usize) -> String {
    format!("bert.encoder.layer.{i}")
}

/// A LayerNorm's parameters.
struct Norm {
    weight: Parameter,
    bias: Parameter,
    eps: f64,
}

impl Norm {
    fn declare(group: &mut Group, name: &str, width: usize) {
        group.specs.push(Spec::new(format!("{name}.weight"), &[width], Init::Ones));
        group.specs.push(Spec::new(format!("{name}.bias"), &[width], Init::Zeros));
    }

    fn new(parameters: &Parameters, name: &str, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: parameters.get(&format!("{name}.weight"))?,
            bias: parameters.get(&format!("{name}.bias"))?,
            eps,
        })
    }

    fn layer_norm(&self) -> norm::LayerNorm<'_> {
        norm::LayerNorm { gamma: &self.weight.value, beta: Some(&self.bias.value), eps: self.eps }
    }

    fn gradients<'a>(&'a self, bias: Option<&'a Parameter>) -> Option<Gradients<'a>> {
        Some(Gradients {
            gamma: self.weight.gradient.as_ref()?,
            beta: Some(self.bias.gradient.as_ref()?),
            bias: bias.and_then(|bias| bias.gradient.as_ref()),
        })
    }
}

/// The embeddings.
pub struct Embeddings {
    words: Parameter,
    positions: Parameter,
    types: Parameter,
    norm: Norm,
    dropout: f64,
    padding: Option<u32>,
}

/// What the embeddings' backward needs.
pub struct SavedEmbeddings(norm::Saved);

impl Embeddings {
    /// The word table as one group, and the rest as another.
    pub fn declare(config: &BertConfig, trains: bool) -> [Group; 2] {
        let normal = Init::Normal(config.initializer_range);
        let spec = |name: &str, rows| Spec::new(name, &[rows, config.hidden_size], normal);
        let words = Group {
            name: WORDS.into(),
            specs: vec![spec(WORDS, config.vocab_size)],
            trains,
            table: true,
        };
        let specs = vec![
            spec("bert.embeddings.position_embeddings.weight", config.max_position_embeddings),
            spec("bert.embeddings.token_type_embeddings.weight", config.type_vocab_size),
        ];
        let mut rest = Group { name: EMBEDDINGS.into(), specs, trains, table: false };
        Norm::declare(&mut rest, "bert.embeddings.LayerNorm", config.hidden_size);
        [words, rest]
    }

    /// Takes the parameters that [`declare`](Self::declare) declared.
    ///
    /// # Errors
    /// If they were not declared.
    pub fn new(parameters: &Parameters, config: &BertConfig) -> Result<Self> {
        Ok(Self {
            words: parameters.get(WORDS)?,
            positions: parameters.get("bert.embeddings.position_embeddings.weight")?,
            types: parameters.get("bert.embeddings.token_type_embeddings.weight")?,
            norm: Norm::new(parameters, "bert.embeddings.LayerNorm", config.layer_norm_eps)?,
            dropout: config.hidden_dropout_prob,
            padding: config.pad_token_id,
        })
    }

    fn dropout(&self, key: Option<DropoutKey>) -> Option<Dropout> {
        Dropout::new(self.dropout, key?, SITE_EMBEDDINGS)
    }

    /// `[T, H]` and what backward needs.
    ///
    /// # Errors
    /// If an id is outside its table.
    pub fn forward(
        &self,
        batch: &Batch,
        key: Option<DropoutKey>,
    ) -> Result<(Tensor, SavedEmbeddings)> {
        let rows = batch.ragged.token_rows();
        let sum = embedding::forward(&[
            Lookup { table: &self.words.value, ids: &batch.tokens },
            Lookup { table: &self.positions.value, ids: &rows.position },
            Lookup { table: &self.types.value, ids: &batch.token_types },
        ])?;
        let (y, saved) = norm::forward(&sum, Junction::default(), self.norm.layer_norm())?;
        let y = dropout::apply(&y, self.dropout(key).as_ref(), rows)?;
        Ok((y, SavedEmbeddings(saved)))
    }

    /// Adds the gradients of positions, types and norm; returns that of the word table.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        batch: &Batch,
        saved: &SavedEmbeddings,
        dy: &Tensor,
        key: Option<DropoutKey>,
    ) -> Result<SparseRows> {
        let rows = batch.ragged.token_rows();
        let dy = dropout::apply(dy, self.dropout(key).as_ref(), rows)?;
        let (dx, _) = norm::backward(
            &dy,
            &saved.0,
            None,
            Junction::default(),
            self.norm.layer_norm(),
            self.norm.gradients(None),
        )?;
        for (table, ids) in [(&self.positions, &rows.position), (&self.types, &batch.token_types)] {
            if let Some(gradient) = &table.gradient {
                embedding::backward_dense(&dx, ids, None, gradient)?;
            }
        }
        Ok(embedding::backward_sparse(&dx, &batch.tokens, self.padding)?)
    }
}

/// One block.
pub struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: Norm,
    intermediate: Linear,
    output: Linear,
    output_norm: Norm,
    activation: Activation,
    heads: usize,
    scale: f64,
    hidden_dropout: f64,
    attention_dropout: f64,
    first_site: u16,
}

/// What a block's backward needs: nothing of `[T, T]`, no mask, no normalised copy.
pub struct SavedLayer {
    x: Tensor,
    attention: attention::Saved,
    attention_norm: norm::Saved,
    a: Tensor,
    /// Intermediate product before its bias, and after the activation.
    h: Tensor,
    activated: Tensor,
    output_norm: norm::Saved,
}

/// The part of a junction that its backward reads.
fn dropped<'a>(dropout: Option<&'a Dropout>, rows: &'a RowIds) -> Junction<'a> {
    Junction { dropout: dropout.map(|dropout| (dropout, rows)), ..Junction::default() }
}

/// The dropouts of a block in one step.
struct Dropouts {
    probabilities: Option<Dropout>,
    attention: Option<Dropout>,
    output: Option<Dropout>,
}

impl Layer {
    /// The parameters of block `i`.
    pub fn declare(config: &BertConfig, i: usize, trains: bool) -> Group {
        let name = layer_name(i);
        let mut group = Group { name: name.clone(), specs: Vec::new(), trains, table: false };
        let (h, inner, std) =
            (config.hidden_size, config.intermediate_size, config.initializer_range);
        for part in ["query", "key", "value"] {
            Linear::declare(&mut group, &format!("{name}.attention.self.{part}"), h, h, std);
        }
        Linear::declare(&mut group, &format!("{name}.attention.output.dense"), h, h, std);
        Norm::declare(&mut group, &format!("{name}.attention.output.LayerNorm"), h);
        Linear::declare(&mut group, &format!("{name}.intermediate.dense"), inner, h, std);
        Linear::declare(&mut group, &format!("{name}.output.dense"), h, inner, std);
        Norm::declare(&mut group, &format!("{name}.output.LayerNorm"), h);
        group
    }

    /// Takes the parameters of block `i`.
    ///
    /// # Errors
    /// If they were not declared, or the activation has no kernel.
    pub fn new(parameters: &Parameters, config: &BertConfig, i: usize) -> Result<Self> {
        let name = layer_name(i);
        let linear = |part: &str| Linear::new(parameters, &format!("{name}.{part}"));
        let norm =
            |part: &str| Norm::new(parameters, &format!("{name}.{part}"), config.layer_norm_eps);
        let head = config.hidden_size / config.num_attention_heads;
        Ok(Self {
            query: linear("attention.self.query")?,
            key: linear("attention.self.key")?,
            value: linear("attention.self.value")?,
            attention_output: linear("attention.output.dense")?,
            attention_norm: norm("attention.output.LayerNorm")?,
            intermediate: linear("intermediate.dense")?,
            output: linear("output.dense")?,
            output_norm: norm("output.LayerNorm")?,
            activation: config.activation().map_err(crate::Error::User)?,
            heads: config.num_attention_heads,
            scale: 1.0 / (head as f64).sqrt(),
            hidden_dropout: config.hidden_dropout_prob,
            attention_dropout: config.attention_probs_dropout_prob,
            first_site: SITE_FIRST_LAYER + SITES_PER_LAYER * i as u16,
        })
    }

    fn dropouts(&self, key: Option<DropoutKey>) -> Dropouts {
        let at = |p, site| Dropout::new(p, key?, self.first_site + site);
        Dropouts {
            probabilities: at(self.attention_dropout, 0),
            attention: at(self.hidden_dropout, 1),
            output: at(self.hidden_dropout, 2),
        }
    }

    fn attention<'a>(&self, ragged: &'a Ragged, dropouts: &'a Dropouts) -> Attention<'a> {
        let dropout = dropouts.probabilities.as_ref();
        let span = Span::default();
        Attention { ragged, heads: self.heads, scale: self.scale, dropout, span }
    }

    /// `[T, H]` and what backward needs.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
    ) -> Result<(Tensor, SavedLayer)> {
        let dropouts = self.dropouts(key);
        let rows = ragged.token_rows();
        let (q, k, v) = (self.query.forward(x)?, self.key.forward(x)?, self.value.forward(x)?);
        let (o, lse) = attention::forward(self.attention(ragged, &dropouts), &q, &k, &v)?;
        let (a, attention_norm) = norm::forward(
            &self.attention_output.forward_without_bias(&o)?,
            Junction {
                bias: Some(&self.attention_output.bias.value),
                residual: Some(x),
                ..dropped(dropouts.attention.as_ref(), rows)
            },
            self.attention_norm.layer_norm(),
        )?;
        let h = self.intermediate.forward_without_bias(&a)?;
        let bias = Some(&self.intermediate.bias.value);
        let activated = activation::forward(&h, bias, self.activation)?;
        let (y, output_norm) = norm::forward(
            &self.output.forward_without_bias(&activated)?,
            Junction {
                bias: Some(&self.output.bias.value),
                residual: Some(&a),
                ..dropped(dropouts.output.as_ref(), rows)
            },
            self.output_norm.layer_norm(),
        )?;
        let attention = attention::Saved { q, k, v, o, lse };
        let x = x.clone();
        Ok((y, SavedLayer { x, attention, attention_norm, a, h, activated, output_norm }))
    }

    /// Adds the block's gradients; returns that of its input unless nothing below trains.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        saved: SavedLayer,
        dy: &Tensor,
        ragged: &Ragged,
        key: Option<DropoutKey>,
        input_trains: bool,
    ) -> Result<Option<Tensor>> {
        let dropouts = self.dropouts(key);
        let rows = ragged.token_rows();
        let (d_output, da) = norm::backward(
            dy,
            &saved.output_norm,
            None,
            dropped(dropouts.output.as_ref(), rows),
            self.output_norm.layer_norm(),
            self.output_norm.gradients(Some(&self.output.bias)),
        )?;
        self.output.backward_weight(&d_output, &saved.activated)?;
        let dh = activation::backward(
            &self.output.backward_input(&d_output)?,
            &saved.h,
            Some(&self.intermediate.bias.value),
            self.activation,
            self.intermediate.bias.gradient.as_ref(),
        )?;
        // d_output may share da's memory; from here on only da is read.
        drop(d_output);
        self.intermediate.backward_weight(&dh, &saved.a)?;
        self.intermediate.backward_input_into(&dh, &da)?;
        drop(dh);

        let (d_dense, dx) = norm::backward(
            &da,
            &saved.attention_norm,
            None,
            dropped(dropouts.attention.as_ref(), rows),
            self.attention_norm.layer_norm(),
            self.attention_norm.gradients(Some(&self.attention_output.bias)),
        )?;
        self.attention_output.backward_weight(&d_dense, &saved.attention.o)?;
        let d_o = self.attention_output.backward_input(&d_dense)?;
        drop(d_dense);
        let (dq, dk, dv) =
            attention::backward(self.attention(ragged, &dropouts), &saved.attention, &d_o)?;
        for (linear, dy) in [(&self.query, &dq), (&self.key, &dk), (&self.value, &dv)] {
            linear.backward_parameters(dy, &saved.x)?;
            if input_trains {
                linear.backward_input_into(dy, &dx)?;
            }
        }
        Ok(input_trains.then_some(dx))
    }
}
