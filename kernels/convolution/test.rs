use candle_core::{DType, Device, Result, Var};

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted, zeros};

/// Inputs, outputs, taps and groups.
const SHAPES: [(usize, usize, usize, usize); 6] =
    [(5, 7, 1, 1), (5, 7, 3, 1), (6, 4, 3, 2), (4, 4, 5, 4), (6, 9, 5, 3), (3, 2, 11, 1)];

fn weight((inputs, outputs, taps, groups): (usize, usize, usize, usize)) -> Result<Tensor> {
    random(&[outputs, inputs / groups, taps], 1)
}

/// `[dx, dw, db]`.
fn gradients([dy, x, weight]: [&Tensor; 3], groups: usize, ragged: &Ragged) -> Result<[Tensor; 3]> {
    let outputs = weight.dim(0)?;
    let (dw, db) = (zeros(weight)?, Tensor::zeros(outputs, dy.dtype(), &Device::Cpu)?);
    backward_parameters(dy, x, groups, ragged, Some(&dw), Some(&db))?;
    Ok([backward_input(dy, weight, groups, ragged)?, dw, db])
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let ragged = ragged()?;
    for shape in SHAPES {
        let (inputs, outputs, _, groups) = shape;
        let (x, w, b) = (random(&[15, inputs], 2)?, weight(shape)?, random(&[outputs], 3)?);
        let dy = random(&[15, outputs], 4)?;
        let loss = |x: &Tensor, w: &Tensor, b: &Tensor| {
            weighted(&forward(x, w, Some(b), groups, &ragged)?, &dy)
        };
        let [dx, dw, db] = gradients([&dy, &x, &w], groups, &ragged)?;
        check_gradient("x", &x, &dx, |x| loss(x, &w, &b))?;
        check_gradient("w", &w, &dw, |w| loss(&x, w, &b))?;
        check_gradient("b", &b, &db, |b| loss(&x, &w, b))?;
    }
    Ok(())
}

/// Candle's conv1d for each sequence alone, with zeros around it, and candle's autograd.
#[test]
fn values_and_gradients_are_candles() -> Result<()> {
    let lengths = [1usize, 97, 2, 257, 3];
    let ragged = Ragged::new(&lengths, &[5, 4, 3, 2, 1])?;
    for shape in SHAPES {
        let (inputs, outputs, taps, groups) = shape;
        let x = Var::from_tensor(&random(&[360, inputs], 2)?)?;
        let w = Var::from_tensor(&weight(shape)?)?;
        let (b, dy) = (random(&[outputs], 3)?, random(&[360, outputs], 4)?);
        let alone = (0..lengths.len()).map(|i| {
            let one = x.narrow(0, ragged.range(i).start, lengths[i])?.t()?.unsqueeze(0)?;
            let y = one.contiguous()?.conv1d(&w, (taps - 1) / 2, 1, 1, groups)?;
            y.squeeze(0)?.t()?.broadcast_add(&b)
        });
        let want = Tensor::cat(&alone.collect::<Result<Vec<_>>>()?, 0)?;
        let autograd = (&want * &dy)?.sum_all()?.backward()?;
        let gradient = |x: &Var| autograd.get(x).expect("both have a gradient").clone();
        let want = [want.detach(), gradient(&x), gradient(&w), dy.sum(0)?];
        let operands = [&x.as_detached_tensor(), &w.as_detached_tensor(), &b, &dy];
        let small = narrow(&operands)?;
        // Sums of at most 33 products of values below 1 for y and dx, of 360 for dw and db.
        for ([x, w, b, dy], tolerance) in
            [(operands, 1e-12), ([&small[0], &small[1], &small[2], &small[3]], 2e-6)]
        {
            let y = forward(x, w, Some(b), groups, &ragged)?;
            let [dx, dw, db] = gradients([dy, x, w], groups, &ragged)?;
            for (got, want) in [y, dx, dw, db].iter().zip(&want) {
                assert_close(&format!("{shape:?} in {:?}", x.dtype()), got, want, tolerance)?;
            }
        }
    }
    Ok(())
}

/// What the neighbours hold does not matter, not even where it is not finite.
#[test]
fn nothing_crosses_the_border_of_a_sequence() -> Result<()> {
    let together = Ragged::new(&[4, 2, 5], &[1, 2, 3])?;
    let alone = Ragged::new(&[2], &[2])?;
    let w = weight((6, 9, 5, 3))?;
    let around = |x: &Tensor, rows| Tensor::full(f64::NAN, (rows, x.dim(1)?), &Device::Cpu);
    let within = |x: &Tensor| Tensor::cat(&[&around(x, 4)?, x, &around(x, 5)?], 0);
    let (x, dy) = (random(&[2, 6], 2)?, random(&[2, 9], 3)?);
    let y = forward(&within(&x)?, &w, None, 3, &together)?;
    let dx = backward_input(&within(&dy)?, &w, 3, &together)?;
    let part = |x: &Tensor| x.narrow(0, 4, 2);
    assert_close("y", &part(&y)?, &forward(&x, &w, None, 3, &alone)?, 1e-15)?;
    assert_close("dx", &part(&dx)?, &backward_input(&dy, &w, 3, &alone)?, 1e-15)
}

#[test]
fn no_bias_is_a_bias_of_zero_and_gradients_accumulate() -> Result<()> {
    let (ragged, shape) = (ragged()?, (6, 9, 3, 3));
    let (x, w, dy) = (random(&[15, 6], 2)?, weight(shape)?, random(&[15, 9], 3)?);
    let zero = Tensor::zeros(9, DType::F64, &Device::Cpu)?;
    let with = forward(&x, &w, Some(&zero), 3, &ragged)?;
    assert_close("y", &forward(&x, &w, None, 3, &ragged)?, &with, 0.0)?;
    let (dw, db) = (zeros(&w)?, zeros(&zero)?);
    backward_parameters(&dy, &x, 3, &ragged, Some(&dw), None)?;
    let once = dw.copy()?;
    backward_parameters(&dy, &x, 3, &ragged, None, Some(&db))?;
    assert_close("dw", &dw, &once, 0.0)?;
    backward_parameters(&dy, &x, 3, &ragged, Some(&dw), Some(&db))?;
    assert_close("dw twice", &dw, &(once * 2.0)?, 1e-14)?;
    assert_close("db twice", &db, &(dy.sum(0)? * 2.0)?, 1e-14)
}

#[test]
fn an_empty_batch_and_shapes_that_do_not_fit() -> Result<()> {
    let empty = Ragged::new(&[], &[])?;
    let w = weight((6, 9, 3, 3))?;
    let (x, dy) = (random(&[0, 6], 2)?, random(&[0, 9], 3)?);
    assert_eq!(forward(&x, &w, None, 3, &empty)?.dims(), [0, 9]);
    let [dx, dw, _] = gradients([&dy, &x, &w], 3, &empty)?;
    assert_eq!(dx.dims(), [0, 6]);
    assert_close("dw", &dw, &zeros(&w)?, 0.0)?;
    let even = forward(&x, &weight((6, 9, 4, 3))?, None, 3, &empty).unwrap_err();
    assert!(even.to_string().contains("weight [9, 2, 4] in 3 groups"), "{even}");
    let wide = forward(&x, &w, None, 1, &empty).unwrap_err();
    assert!(wide.to_string().contains("x has shape [0, 6], expected [0, 2]"), "{wide}");
    Ok(())
}
