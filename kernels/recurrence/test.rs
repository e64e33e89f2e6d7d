use candle_core::{Device, Result};
use rayon::ThreadPoolBuilder;

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted, zeros};

mod golden;

/// Operands of a layer over `ragged`, f64.
struct Layer {
    gx: Tensor,
    w_hh: Tensor,
    b_hh: Tensor,
    start: State,
    dh: Tensor,
}

impl Layer {
    fn random(op: Recurrence<'_>, hidden: usize) -> Result<Self> {
        let (t, b, rows) = (op.ragged.tokens(), op.ragged.sequences(), op.cell.gates() * hidden);
        let c = (op.cell == Cell::Lstm).then(|| random(&[b, hidden], 5)).transpose()?;
        Ok(Self {
            gx: (random(&[t, rows], 1)? * 2.0)?,
            // So that a sum over H stays about 1.
            w_hh: (random(&[rows, hidden], 2)? * (2.0 / (hidden as f64).sqrt()))?,
            b_hh: random(&[rows], 3)?,
            start: State { h: random(&[b, hidden], 4)?, c },
            dh: random(&[t, hidden], 6)?,
        })
    }

    fn f32(&self) -> Result<Self> {
        let all = narrow(&[&self.gx, &self.w_hh, &self.b_hh, &self.start.h, &self.dh])?;
        let Ok([gx, w_hh, b_hh, h, dh]) = <[Tensor; 5]>::try_from(all) else { unreachable!() };
        let c = self.start.c.as_ref().map(|c| narrow(&[c])).transpose()?;
        Ok(Self { gx, w_hh, b_hh, start: State { h, c: c.map(|c| c[0].clone()) }, dh })
    }

    fn weights(&self) -> Weights<'_> {
        Weights { w_hh: &self.w_hh, b_hh: Some(&self.b_hh) }
    }

    /// h, with another start.
    fn h_from(&self, op: Recurrence<'_>, start: Option<&State>) -> Result<Tensor> {
        Ok(forward(op, self.gx.copy()?, self.weights(), start)?.0)
    }

    /// h, dgx, dW_hh, db_hh and the gradient of the start.
    fn run(
        &self,
        op: Recurrence<'_>,
        start: Option<&State>,
    ) -> Result<(Vec<Tensor>, Option<State>)> {
        let (h, saved) = forward(op, self.gx.copy()?, self.weights(), start)?;
        let (dw, db) = (zeros(&self.w_hh)?, zeros(&self.b_hh)?);
        let into = Weights { w_hh: &dw, b_hh: Some(&db) };
        let Gradients { gx, start } = backward(op, saved, &self.w_hh, &self.dh, into)?;
        Ok((vec![h, gx, dw, db], start))
    }
}

/// Both cells in both directions.
fn each(ragged: &Ragged, test: impl Fn(Recurrence<'_>) -> Result<()>) -> Result<()> {
    for cell in [Cell::Lstm, Cell::Gru] {
        for reverse in [false, true] {
            test(Recurrence { cell, ragged, reverse })?;
        }
    }
    Ok(())
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Lengths of more than one group, unsorted, one token among them.
fn many() -> Result<Ragged> {
    let lengths: Vec<usize> = (0..29).map(|i| 1 + i * 17 % 23).collect();
    Ragged::new(&lengths, &[3; 29])
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for hidden in [1, 5, 19] {
        each(&ragged()?, |op| {
            let layer = Layer::random(op, hidden)?;
            let start = Some(&layer.start);
            let (all, d_start) = layer.run(op, start)?;
            let loss = |gx: &Tensor, weights: Weights<'_>, start: Option<&State>| {
                weighted(&forward(op, gx.copy()?, weights, start)?.0, &layer.dh)
            };
            let Weights { w_hh, b_hh } = layer.weights();
            check_gradient("gx", &layer.gx, &all[1], |gx| loss(gx, layer.weights(), start))?;
            check_gradient("w_hh", w_hh, &all[2], |w_hh| {
                loss(&layer.gx, Weights { w_hh, b_hh }, start)
            })?;
            check_gradient("b_hh", &layer.b_hh, &all[3], |b_hh| {
                loss(&layer.gx, Weights { w_hh, b_hh: Some(b_hh) }, start)
            })?;
            let d_start = d_start.expect("it was given a start");
            check_gradient("h0", &layer.start.h, &d_start.h, |h| {
                let start = State { h: h.clone(), c: layer.start.c.clone() };
                loss(&layer.gx, layer.weights(), Some(&start))
            })?;
            if let (Some(c), Some(dc)) = (&layer.start.c, &d_start.c) {
                check_gradient("c0", c, dc, |c| {
                    let start = State { h: layer.start.h.clone(), c: Some(c.clone()) };
                    loss(&layer.gx, layer.weights(), Some(&start))
                })?;
            }
            assert_eq!(d_start.c.is_some(), op.cell == Cell::Lstm);
            Ok(())
        })?;
    }
    Ok(())
}

/// The formulas, one number at a time: an implementation that shares nothing with the other.
#[test]
fn values_are_the_formulas() -> Result<()> {
    each(&ragged()?, |op| {
        let layer = Layer::random(op, 7)?;
        let (h0, c0) = (layer.start.h.to_vec2::<f64>()?, layer.start.c.as_ref());
        let c0 = c0.map_or(Ok(vec![vec![0.0; 7]; 3]), |c0| c0.to_vec2::<f64>())?;
        let (w_hh, b_hh) = (layer.w_hh.flatten_all()?.to_vec1()?, layer.b_hh.to_vec1()?);
        let naive =
            naive::Naive { cell: op.cell, hidden: 7, w_hh: &w_hh, b_hh: &b_hh, round: &|x| x };
        let (all, _) = layer.run(op, Some(&layer.start))?;
        let [gx, dh, h, d_gx] =
            [&layer.gx, &layer.dh, &all[0], &all[1]].map(|t| t.to_vec2::<f64>());
        let (gx, dh, h, d_gx) = (gx?, dh?, h?, d_gx?);
        for i in 0..3 {
            let mut rows: Vec<usize> = op.ragged.range(i).collect();
            if op.reverse {
                rows.reverse();
            }
            let own = |from: &[Vec<f64>]| rows.iter().map(|row| from[*row].clone()).collect();
            let passed = naive.forward(&own(&gx), h0[i].clone(), c0[i].clone());
            let back = naive.backward(&passed, &own(&dh));
            for (got, want) in [(own(&h), passed.h), (own(&d_gx), back.gx)] {
                let [got, want]: [Tensor; 2] = [
                    Tensor::new(got as Vec<Vec<f64>>, &Device::Cpu)?,
                    Tensor::new(want, &Device::Cpu)?,
                ];
                assert_close(&format!("{op:?}"), &got, &want, 1e-13)?;
            }
        }
        Ok(())
    })
}

#[test]
fn gradients_accumulate_and_what_is_not_given_is_zero() -> Result<()> {
    each(&ragged()?, |op| {
        let layer = Layer::random(op, 5)?;
        let zero = |t: &Tensor| t.zeros_like();
        let c = layer.start.c.as_ref().map(zero).transpose()?;
        let start = State { h: zero(&layer.start.h)?, c };
        let (with, _) = layer.run(op, Some(&start))?;
        let (without, d_start) = layer.run(op, None)?;
        assert!(d_start.is_none());
        for (with, without) in with.iter().zip(&without) {
            assert_close("no start", without, with, 0.0)?;
        }
        let no_bias = Weights { w_hh: &layer.w_hh, b_hh: None };
        let zero_bias = Weights { b_hh: Some(&zero(&layer.b_hh)?), ..no_bias };
        let (got, _) = forward(op, layer.gx.copy()?, no_bias, None)?;
        let (want, saved) = forward(op, layer.gx.copy()?, zero_bias, None)?;
        assert_close("no bias", &got, &want, 0.0)?;
        let (dw, db) = (random(&[layer.w_hh.dim(0)?, 5], 8)?, random(&[layer.w_hh.dim(0)?], 9)?);
        let (dw_before, db_before) = (dw.copy()?, db.copy()?);
        backward(op, saved, &layer.w_hh, &layer.dh, Weights { w_hh: &dw, b_hh: Some(&db) })?;
        let (_, saved) = forward(op, layer.gx.copy()?, no_bias, None)?;
        let (alone, alone_b) = (zeros(&dw)?, zeros(&db)?);
        let into = Weights { w_hh: &alone, b_hh: Some(&alone_b) };
        backward(op, saved, &layer.w_hh, &layer.dh, into)?;
        assert_close("dw", &dw, &(dw_before + alone)?, 1e-12)?;
        assert_close("db", &db, &(db_before + alone_b)?, 1e-12)
    })
}

#[test]
fn a_sequence_in_a_batch_is_what_it_is_alone_to_the_bit() -> Result<()> {
    let ragged = many()?;
    each(&ragged, |op| {
        let layer = Layer::random(op, 19)?.f32()?;
        let (all, _) = layer.run(op, None)?;
        for i in 0..ragged.sequences() {
            let range = ragged.range(i);
            let rows = |t: &Tensor| t.narrow(0, range.start, range.len())?.copy();
            let own = Ragged::new(&[range.len()], &[3])?;
            let alone = Layer {
                gx: rows(&layer.gx)?,
                w_hh: layer.w_hh.clone(),
                b_hh: layer.b_hh.clone(),
                start: layer.start.clone(),
                dh: rows(&layer.dh)?,
            };
            let (alone, _) = alone.run(Recurrence { ragged: &own, ..op }, None)?;
            for k in [0, 1] {
                assert_eq!(bits(&alone[k])?, bits(&rows(&all[k])?)?, "sequence {i} of {op:?}");
            }
        }
        Ok(())
    })
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    let ragged = many()?;
    each(&ragged, |op| {
        let layer = Layer::random(op, 70)?.f32()?;
        let run = |threads| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let (all, start) = pool.install(|| layer.run(op, Some(&layer.start)))?;
            let start = start.expect("it was given a start");
            all.iter().chain([&start.h]).chain(&start.c).map(bits).collect::<Result<Vec<_>>>()
        };
        let one = run(1)?;
        for threads in [2, 5] {
            assert!(run(threads)? == one, "{threads} threads, {op:?}");
        }
        Ok(())
    })
}

#[test]
fn f32_matches_f64() -> Result<()> {
    let ragged = Ragged::new(&[97, 1, 257, 30], &[1, 2, 3, 4])?;
    for hidden in [16, 37, 130] {
        each(&ragged, |op| {
            let layer = Layer::random(op, hidden)?;
            let (want, want_start) = layer.run(op, Some(&layer.start))?;
            let small = layer.f32()?;
            let (got, start) = small.run(op, Some(&small.start))?;
            let (start, want_start) = (start.expect("given"), want_start.expect("given"));
            let states = start.c.iter().zip(&want_start.c).chain([(&start.h, &want_start.h)]);
            for (i, (got, want)) in got.iter().zip(&want).chain(states).enumerate() {
                assert_close(&format!("{i} of {op:?}, H {hidden}"), got, want, 1e-5)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_is_not_a_number_stays_in_its_sequence_and_reaches_its_end() -> Result<()> {
    let ragged = ragged()?;
    each(&ragged, |op| {
        let layer = Layer::random(op, 5)?;
        let mut values = layer.gx.to_vec2::<f64>()?;
        let bad = if op.reverse { 14 } else { 6 };
        values[bad][0] = f64::NAN;
        let gx = Tensor::new(values, &Device::Cpu)?;
        let h = Layer { gx, ..layer }.h_from(op, None)?.to_vec2::<f64>()?;
        let good = |row: &Vec<f64>| row.iter().all(|value| value.is_finite());
        assert!(h[..6].iter().all(good), "{op:?}");
        assert!(!h[6..].iter().any(good), "{op:?}");
        Ok(())
    })
}

#[test]
fn an_empty_batch_has_no_rows_and_shapes_that_do_not_fit_are_named() -> Result<()> {
    let empty = Ragged::new(&[], &[])?;
    each(&empty, |op| {
        let layer = Layer::random(op, 5)?;
        let (all, start) = layer.run(op, Some(&layer.start))?;
        assert_eq!(all[0].dims(), [0, 5]);
        assert_close("dw", &all[2], &zeros(&layer.w_hh)?, 0.0)?;
        assert_eq!(start.expect("given").h.dims(), [0, 5]);
        Ok(())
    })?;
    let ragged = ragged()?;
    let op = Recurrence { cell: Cell::Gru, ragged: &ragged, reverse: false };
    let layer = Layer::random(Recurrence { cell: Cell::Lstm, ..op }, 5)?;
    let error = layer.h_from(op, None).unwrap_err().to_string();
    assert!(error.contains("W_hh [20, 5] of Gru, whose rows are 3 times its columns"), "{error}");
    let layer = Layer::random(op, 5)?;
    let with_c = State { c: Some(layer.start.h.clone()), h: layer.start.h.clone() };
    let error = layer.h_from(op, Some(&with_c)).unwrap_err().to_string();
    assert!(error.contains("Gru does not start from a c"), "{error}");
    let short = Layer { gx: layer.gx.narrow(0, 0, 14)?, ..layer };
    let error = short.h_from(op, None).unwrap_err().to_string();
    assert!(error.contains("recurrence: gx has shape [14, 15], expected [15, 15]"), "{error}");
    Ok(())
}
