//! Frozen linears whose weights are kept in 8 or 4 bits, each in turn with one of full width: forward and the
//! input's gradient; a weight has none.

use allreel_kernels::{
    linear,
    quantized::{self, BLOCK, FourBit, Int8, Kind, Quantized},
};
use candle_core::{Device, Result};

use super::{Case, Pass, Setup, Work};
use crate::command::bench::measure::Body;

/// What the others of a group are compared with.
const PLAIN: &str = "quantized: plain";

/// What a weight is kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As activations are.
    Plain,
    /// 8 bits, a scale a row.
    Int8,
    /// 4 bits, a scale for each block.
    Nf4,
}

/// For each of H to H, H to 4H and back, and each pass: full width and then int8 and, where it fits, NF4.
pub fn groups(setup: &Setup) -> Vec<Vec<Case>> {
    let hidden = setup.sizes.hidden;
    let shapes = [(hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)];
    let each = |(k, n): (usize, usize)| {
        let formats = [Format::Plain, Format::Int8, Format::Nf4];
        let fits = move |format: &Format| *format != Format::Nf4 || k.is_multiple_of(BLOCK);
        let group = move |pass: Pass| {
            let cases = formats.into_iter().filter(fits);
            cases.map(|format| case(setup, (k, n), format, pass)).collect()
        };
        Pass::ALL.map(group)
    };
    shapes.into_iter().flat_map(each).collect()
}

fn case(setup: &Setup, (k, n): (usize, usize), format: Format, pass: Pass) -> Case {
    let tokens = setup.sizes.tokens;
    let name = match format {
        Format::Plain => PLAIN,
        Format::Int8 => "quantized int8",
        Format::Nf4 => "quantized nf4",
    };
    let (name, sizes) = (format!("{name} {}", pass.name()), format!("{tokens} tokens, {k} to {n}"));
    let work = work(tokens, (k, n), setup.element(), format, pass);
    Case::new(name, sizes, work, move |setup| run(setup, (k, n), format, pass))
}

/// x and dy are read, y and dx written, W is read each time.
pub fn work(
    tokens: usize,
    (inputs, outputs): (usize, usize),
    element: f64,
    format: Format,
    pass: Pass,
) -> Work {
    let (t, k, n) = (tokens as f64, inputs as f64, outputs as f64);
    let weight = match format {
        Format::Plain => element * n * k,
        Format::Int8 => n * k + 4.0 * n,
        // Codes, a byte for the scale of 64, a float for those of 256 times as many.
        Format::Nf4 => n * k * (1.0 / 2.0 + 1.0 / 64.0 + 4.0 / 16384.0),
    };
    let each = Work { bytes: element * t * (k + n) + weight, flops: 2.0 * t * n * k };
    pass.work(each, each)
}

fn run(setup: &Setup, (k, n): (usize, usize), format: Format, pass: Pass) -> Result<Body> {
    let tokens = setup.sizes.tokens;
    let (x, dy) = (setup.normal((tokens, k))?, setup.normal((tokens, n))?);
    let plain = setup.normal((n, k))?;
    let host = || plain.to_device(&Device::Cpu);
    let weight: Quantized = match format {
        Format::Plain => {
            return Ok(Box::new(move || {
                linear::forward(&x, &plain, None)?;
                if pass == Pass::Both {
                    linear::backward_input(&dy, &plain)?;
                }
                Ok(())
            }));
        }
        Format::Int8 => Int8::quantize(&host()?)?.into(),
        Format::Nf4 => FourBit::quantize(&host()?, Kind::Nf4)?.into(),
    };
    let weight = weight.to_device(&setup.device)?;
    Ok(Box::new(move || {
        quantized::forward(&x, &weight, None)?;
        if pass == Pass::Both {
            quantized::backward_input(&dy, &weight)?;
        }
        Ok(())
    }))
}
