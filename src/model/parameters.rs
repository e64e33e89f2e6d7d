//! Parameters of a network in flat buckets.
//!
//! A bucket is the parameters of one group (a layer, the head): their values, gradients and
//! optimizer state, each one contiguous f32 tensor of which every parameter is a view. Buckets stand
//! in the order in which backward finishes them, so that a bucket can be reduced as soon as its
//! layer is done. Inside a bucket the parameters that take weight decay come first.
//!
//! Where the model computes in bf16, a bucket also has a bf16 copy of its values: matrices and tables are
//! views of that copy, which the optimizer writes with the f32 masters; vectors are the masters.
//!
//! A large embedding table is a bucket without gradient memory: its gradient is
//! [`SparseRows`](allreel_kernels::embedding::SparseRows). What does not train has a value only, which
//! may be quantised as it is loaded: one matrix at a time is then whole in memory.

use std::collections::{HashMap, HashSet};

use allreel_kernels::{
    adamw,
    quantized::{FourBit, Int8, Kind, Quantized},
};
use candle_core::{DType, Device, Tensor};

use crate::{Error, Result, config::Quantization, device::Placement};

/// How a parameter starts when no checkpoint has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// Normal, cut off at this many standard deviations.
    TruncatedNormal {
        /// Standard deviation before the cut.
        deviation: f64,
        /// Deviations.
        cutoff: f64,
    },
    /// Uniform between this and its negative.
    Uniform(f64),
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Zero, but one for `len` elements from `first` on.
    OnesFrom {
        /// The first that is one.
        first: usize,
        /// How many are.
        len: usize,
    },
    /// Square blocks one below the other, each orthogonal: a random rotation or reflection.
    Orthogonal,
}

/// One parameter of an architecture.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Hugging Face name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its start.
    pub init: Init,
    /// Whether checkpoints hold the matrix transposed.
    pub transposed: bool,
    /// Whether weight decay applies: to neither biases nor norms, as in Hugging Face's trainer.
    pub decays: bool,
    /// Whether it trains.
    pub trains: bool,
    /// Whether an adapter added it: no checkpoint of the model has it.
    pub added: bool,
    /// What it is kept in, if it does not train.
    pub quantization: Option<Quantization>,
}

impl Spec {
    /// A frozen parameter called `name`; where it trains, it decays unless it is a bias.
    pub fn new(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        let name = name.into();
        let decays = !name.ends_with("bias");
        Self {
            name,
            shape: shape.to_vec(),
            init,
            transposed: false,
            decays,
            trains: false,
            added: false,
            quantization: None,
        }
    }

    /// One that an adapter adds, and that trains.
    pub fn added(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        Self { trains: true, added: true, ..Self::new(name, shape, init) }
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Parameters that become ready together in backward.
#[derive(Clone, Debug)]
pub struct Group {
    /// What they belong to, for messages.
    pub name: String,
    /// The parameters.
    pub specs: Vec<Spec>,
    /// Whether this is one embedding table whose gradient is sparse.
    pub table: bool,
}

impl Group {
    /// An empty group.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), specs: Vec::new(), table: false }
    }

    /// Whether any of them trains.
    pub fn trains(&self) -> bool {
        self.specs.iter().any(|spec| spec.trains)
    }
}

/// A parameter as its layer holds it: views into a bucket.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Current value, as the layer computes with it.
    pub value: Tensor,
    /// Where its gradient is added; `None` if it is frozen or a sparse table.
    pub gradient: Option<Tensor>,
}

/// The matrix of a linear layer, or a table, as its layer holds it.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Numbers, trained or frozen.
    Dense(Parameter),
    /// Frozen, in 8 or 4 bits.
    Quantized(Quantized),
}

impl Weight {
    /// Bytes of the value.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(Parameter { value, .. }) => {
                value.elem_count() * value.dtype().size_in_bytes()
            }
            Self::Quantized(weight) => weight.bytes(),
        }
    }

    fn elements(&self) -> usize {
        match self {
            Self::Dense(parameter) => parameter.value.elem_count(),
            Self::Quantized(weight) => weight.dims().0 * weight.dims().1,
        }
    }
}

/// Where a parameter lies in its bucket.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Hugging Face name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// First element.
    pub offset: usize,
}

/// Values, gradients and optimizer state of what trains of a group.
pub struct Bucket {
    /// The group's name.
    pub name: String,
    /// Values and optimizer state.
    pub state: adamw::State,
    /// Gradients, in the same places; `None` for a table.
    pub gradients: Option<Tensor>,
    /// Number of leading elements that take weight decay.
    pub decayed: usize,
    /// What lies where.
    pub entries: Vec<Entry>,
}

impl Bucket {
    /// Number of elements, those between parameters included.
    pub fn len(&self) -> usize {
        self.state.values.elem_count()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part of a flat tensor of this bucket that belongs to `entry`, in its shape.
    pub fn view(flat: &Tensor, entry: &Entry) -> Result<Tensor> {
        let len = entry.shape.iter().product();
        Ok(flat.narrow(0, entry.offset, len)?.reshape(entry.shape.as_slice())?)
    }
}

/// Parameters begin at multiples of this many elements, so that vectors of 16 bytes are aligned.
pub(crate) const ALIGNMENT: usize = 8;

/// All parameters of a network.
pub struct Parameters {
    /// Where they are.
    pub placement: Placement,
    /// What trains, in the order of backward.
    pub buckets: Vec<Bucket>,
    by_name: HashMap<String, Weight>,
    /// The f32 values of those that layers hold in another dtype.
    masters: HashMap<String, Tensor>,
    /// All names, in the order of the architecture.
    names: Vec<String>,
    /// Names of matrices that checkpoints hold transposed.
    transposed: HashSet<String>,
    /// Names of what an adapter added.
    added: HashSet<String>,
}

impl Parameters {
    /// Lays the groups (given in the order of forward) out, with the values that `value` gives for
    /// each spec.
    ///
    /// # Errors
    /// Those of `value`.
    pub fn new(
        placement: &Placement,
        groups: &[Group],
        mut value: impl FnMut(&Spec) -> Result<Tensor>,
    ) -> Result<Self> {
        let specs = || groups.iter().flat_map(|group| &group.specs);
        let mut parameters = Self {
            placement: placement.clone(),
            buckets: Vec::new(),
            by_name: HashMap::new(),
            masters: HashMap::new(),
            names: specs().map(|spec| spec.name.clone()).collect(),
            transposed: specs()
                .filter(|spec| spec.transposed)
                .map(|spec| spec.name.clone())
                .collect(),
            added: specs().filter(|spec| spec.added).map(|spec| spec.name.clone()).collect(),
        };
        for group in groups {
            if group.trains() {
                parameters.add_bucket(group, &mut value)?;
            }
            for spec in group.specs.iter().filter(|spec| !spec.trains) {
                let frozen = frozen(placement, spec, value(spec)?)?;
                parameters.by_name.insert(spec.name.clone(), frozen);
            }
        }
        parameters.buckets.reverse();
        Ok(parameters)
    }

    fn add_bucket(
        &mut self,
        group: &Group,
        value: &mut impl FnMut(&Spec) -> Result<Tensor>,
    ) -> Result<()> {
        let mut specs: Vec<&Spec> = group.specs.iter().filter(|spec| spec.trains).collect();
        specs.sort_by_key(|spec| !spec.decays);
        let (mut entries, mut values, mut len, mut decayed) = (Vec::new(), Vec::new(), 0, 0);
        for spec in &specs {
            let offset = usize::next_multiple_of(len, ALIGNMENT);
            if offset > len {
                values.push(Tensor::zeros(offset - len, DType::F32, &Device::Cpu)?);
            }
            values.push(value(spec)?.flatten_all()?);
            entries.push(Entry { name: spec.name.clone(), shape: spec.shape.clone(), offset });
            len = offset + spec.len();
            decayed = if spec.decays { len } else { decayed };
        }
        let values = match values.as_slice() {
            // Concatenating one tensor would share its memory with the checkpoint.
            [one] => one.copy()?,
            several => Tensor::cat(several, 0)?,
        };
        let Placement { device, dtype } = self.placement.clone();
        let zeros = || Tensor::zeros(len, DType::F32, &device);
        let copy = (dtype != DType::F32).then(|| values.to_dtype(dtype)?.to_device(&device));
        let state = adamw::State {
            values: values.to_device(&device)?,
            exp_avg: zeros()?,
            exp_avg_sq: zeros()?,
            copy: copy.transpose()?,
        };
        let gradients = if group.table { None } else { Some(zeros()?) };
        let bucket = Bucket { name: group.name.clone(), state, gradients, decayed, entries };
        for entry in &bucket.entries {
            let view = |flat: &Tensor| Bucket::view(flat, entry);
            let master = view(&bucket.state.values)?;
            let value = match &bucket.state.copy {
                Some(copy) if entry.shape.len() > 1 => {
                    self.masters.insert(entry.name.clone(), master);
                    view(copy)?
                }
                _ => master,
            };
            let gradient = bucket.gradients.as_ref().map(view).transpose()?;
            let parameter = Parameter { value, gradient };
            self.by_name.insert(entry.name.clone(), Weight::Dense(parameter));
        }
        self.buckets.push(bucket);
        Ok(())
    }

    /// Brings what layers compute with up to the f32 values, after these were written from outside.
    ///
    /// # Errors
    /// If the device fails.
    pub fn refresh(&self) -> Result<()> {
        for state in self.buckets.iter().map(|bucket| &bucket.state) {
            if let Some(copy) = &state.copy {
                copy.slice_set(&state.values.to_dtype(copy.dtype())?, 0, 0)?;
            }
        }
        Ok(())
    }

    /// The parameter called `name`, of a layer whose parameters are never quantised.
    ///
    /// # Errors
    /// If the architecture has no such parameter: a bug of ours.
    pub fn get(&self, name: &str) -> Result<Parameter> {
        match self.weight(name)? {
            Weight::Dense(parameter) => Ok(parameter),
            Weight::Quantized(_) => Err(Error::Bug(format!("{name} is quantised"))),
        }
    }

    /// The parameter called `name`, which may be quantised.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn weight(&self, name: &str) -> Result<Weight> {
        self.by_name.get(name).cloned().ok_or_else(|| Error::Bug(format!("no parameter {name}")))
    }

    /// Number of the bucket of the group called `group`, if it trains.
    pub fn bucket(&self, group: &str) -> Option<usize> {
        self.buckets.iter().position(|bucket| bucket.name == group)
    }

    /// Names of all parameters, in the order of the architecture.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Names of those that train, in the order of the architecture.
    pub fn trained(&self) -> impl Iterator<Item = &str> {
        let entries = self.buckets.iter().flat_map(|bucket| &bucket.entries);
        let trained: HashSet<&str> = entries.map(|entry| entry.name.as_str()).collect();
        self.names().filter(move |name| trained.contains(name))
    }

    /// Whether an adapter added it: the model itself has no such parameter.
    pub fn is_added(&self, name: &str) -> bool {
        self.added.contains(name)
    }

    /// Value of a parameter: f32, but for matrices that are frozen, which are only held as layers compute
    /// with them; what is quantised is dequantised.
    ///
    /// # Errors
    /// As [`get`](Self::get), and if memory runs out.
    pub fn value(&self, name: &str) -> Result<Tensor> {
        if let Some(master) = self.masters.get(name) {
            return Ok(master.clone());
        }
        match self.weight(name)? {
            Weight::Dense(parameter) => Ok(parameter.value),
            Weight::Quantized(weight) => Ok(weight.dequantize()?),
        }
    }

    /// Where the value of a parameter is written from outside.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn master(&self, name: &str) -> Result<Tensor> {
        match self.masters.get(name) {
            Some(master) => Ok(master.clone()),
            None => Ok(self.get(name)?.value),
        }
    }

    /// `tensor`, which has the shape of the parameter `name` in memory or in a checkpoint, in the
    /// other of the two layouts (they differ for GPT-2's `Conv1D`).
    ///
    /// # Errors
    /// If memory runs out.
    pub fn relaid(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        match self.transposed.contains(name) {
            true => Ok(tensor.t()?.contiguous()?),
            false => Ok(tensor.clone()),
        }
    }

    /// Number of elements of all parameters.
    pub fn count(&self) -> usize {
        self.by_name.values().map(Weight::elements).sum()
    }

    /// Bytes of all values as layers compute with them.
    pub fn bytes(&self) -> usize {
        self.by_name.values().map(Weight::bytes).sum()
    }

    /// Number of elements that train.
    pub fn trainable_count(&self) -> usize {
        let entries = self.buckets.iter().flat_map(|bucket| &bucket.entries);
        entries.map(|entry| entry.shape.iter().product::<usize>()).sum()
    }
}

/// What does not train, as its layer computes with it.
fn frozen(placement: &Placement, spec: &Spec, value: Tensor) -> Result<Weight> {
    let Some(quantization) = spec.quantization else {
        // Its own dtype first: the device never holds the f32 of what is frozen.
        let held = value.to_dtype(stored(placement, spec.shape.len()))?;
        let value = held.to_device(&placement.device)?;
        return Ok(Weight::Dense(Parameter { value, gradient: None }));
    };
    let quantized = match quantization {
        Quantization::Int8 => Int8::quantize(&value).map(Quantized::from),
        Quantization::Nf4 => FourBit::quantize(&value, Kind::Nf4).map(Quantized::from),
        Quantization::Fp4 => FourBit::quantize(&value, Kind::Fp4).map(Quantized::from),
    };
    let quantized = quantized.map_err(|e| {
        let kind = serde_json::json!(quantization);
        // Its first line: the others are where it came from.
        let e = e.to_string().lines().next().unwrap_or_default().to_owned();
        Error::Data(format!("model.quantization = {kind}: {}: {e}", spec.name))
    })?;
    Ok(Weight::Quantized(quantized.to_device(&placement.device)?))
}

/// What a parameter of `rank` dimensions is stored as.
fn stored(placement: &Placement, rank: usize) -> DType {
    if rank > 1 { placement.dtype } else { DType::F32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, trains: bool) -> Group {
        let specs = ["x.weight", "x.bias", "LayerNorm.weight", "y.weight"].map(|leaf| Spec {
            decays: leaf.starts_with(['x', 'y']) && leaf.ends_with("weight"),
            trains,
            ..Spec::new(format!("{name}.{leaf}"), &[2, 3], Init::Ones)
        });
        Group { name: name.into(), specs: specs.to_vec(), table: false }
    }

    #[test]
    fn buckets_are_in_reverse_order_with_decayed_parameters_first() -> Result<()> {
        let mut next = 0.0;
        let parameters = Parameters::new(
            &Placement::CPU,
            &[group("a", false), group("b", true), group("c", true)],
            |spec| {
                next += 1.0;
                Ok(Tensor::full(next as f32, spec.shape.as_slice(), &Device::Cpu)?)
            },
        )?;
        assert_eq!(parameters.bucket("c"), Some(0));
        assert_eq!(parameters.bucket("b"), Some(1));
        assert_eq!(parameters.bucket("a"), None);
        let bucket = &parameters.buckets[1];
        assert_eq!((bucket.decayed, bucket.len()), (14, 30));
        assert_eq!(bucket.entries[1].name, "b.y.weight");
        assert!(parameters.get("a.x.weight")?.gradient.is_none());
        assert_eq!((parameters.count(), parameters.trainable_count()), (72, 48));
        let names: Vec<&str> = parameters.names().collect();
        assert_eq!(names[4..8], ["b.x.weight", "b.x.bias", "b.LayerNorm.weight", "b.y.weight"]);
        assert!(parameters.trained().eq(names[4..].iter().copied()));
        Ok(())
    }

    #[test]
    fn a_parameter_sees_what_is_written_to_its_bucket() -> Result<()> {
        let parameters = Parameters::new(&Placement::CPU, &[group("a", true)], |s| {
            Ok(Tensor::ones(s.shape.as_slice(), DType::F32, &Device::Cpu)?)
        })?;
        let bucket = &parameters.buckets[0];
        allreel_kernels::common::host::write::<f32, _>(&bucket.state.values, |flat| {
            flat[8..14].fill(7.0);
            Ok(())
        })?;
        assert_eq!(parameters.get("a.y.weight")?.value.to_vec2::<f32>()?, [[7.0; 3]; 2]);
        assert_eq!(parameters.get("a.x.weight")?.value.to_vec2::<f32>()?, [[1.0; 3]; 2]);
        Ok(())
    }
}
