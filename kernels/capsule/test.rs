use candle_core::{DType, Device, Result};
use rayon::ThreadPoolBuilder;

use super::*;
use crate::testing::{assert_close, check_gradient, narrow, ragged, random, weighted};

const ROUTING: Routing = Routing { capsules: 4, size: 3, iterations: 3 };

/// The published procedure, one number at a time: an implementation that shares nothing with the other.
fn published(u: &[Vec<f64>], routing: Routing) -> Vec<f64> {
    let Routing { capsules, size, iterations } = routing;
    let mut b = vec![vec![0.0f64; capsules]; u.len()];
    let mut v = vec![0.0; capsules * size];
    for iteration in 0..iterations {
        let mut s = vec![0.0; capsules * size];
        for (b, u) in b.iter().zip(u) {
            let all: f64 = b.iter().map(|b| b.exp()).sum();
            (0..u.len()).for_each(|k| s[k] += b[k / size].exp() / all * u[k]);
        }
        for (v, s) in v.chunks_mut(size).zip(s.chunks(size)) {
            let length = s.iter().map(|s| s * s).sum::<f64>().sqrt();
            let scale = length * length / (1.0 + length * length);
            v.iter_mut().zip(s).for_each(|(v, s)| *v = scale * s / length);
        }
        if iteration + 1 < iterations {
            for (b, u) in b.iter_mut().zip(u) {
                (0..u.len()).for_each(|k| b[k / size] += u[k] * v[k]);
            }
        }
    }
    v
}

#[test]
fn values_are_the_published_procedures() -> Result<()> {
    let ragged = Ragged::new(&[1, 97, 2, 257], &[4, 3, 2, 1])?;
    for (capsules, size, iterations) in [(1, 1, 1), (4, 3, 1), (4, 3, 3), (7, 16, 5), (1, 9, 2)] {
        let routing = Routing { capsules, size, iterations };
        let u = (random(&[357, capsules * size], 1)? * 2.0)?;
        let rows = u.to_vec2::<f64>()?;
        let want: Vec<_> = (0..4).map(|i| published(&rows[ragged.range(i)], routing)).collect();
        let want = Tensor::new(want, &Device::Cpu)?;
        assert_close("v", &forward(&u, &ragged, routing)?.0, &want, 1e-12)?;
        // Sums of 257 f32 below 2 three times and more, each feeding the next.
        let small = &narrow(&[&u])?[0];
        assert_close("v f32", &forward(small, &ragged, routing)?.0, &want, 2e-5)?;
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let ragged = ragged()?;
    for (capsules, size, iterations) in [(1, 1, 1), (4, 3, 1), (4, 3, 2), (3, 17, 3), (2, 2, 5)] {
        let routing = Routing { capsules, size, iterations };
        let u = (random(&[15, capsules * size], 1)? * 2.0)?;
        let dv = random(&[3, capsules * size], 2)?;
        let (_, saved) = forward(&u, &ragged, routing)?;
        let du = backward(&u, &saved, &dv, &ragged, routing)?;
        let loss = |u: &Tensor| weighted(&forward(u, &ragged, routing)?.0, &dv);
        check_gradient(&format!("u, {routing:?}"), &u, &du, loss)?;
        let small = narrow(&[&u, &dv])?;
        let (_, saved) = forward(&small[0], &ragged, routing)?;
        let small = backward(&small[0], &saved, &small[1], &ragged, routing)?;
        assert_close("du f32", &small, &du, 1e-5)?;
    }
    Ok(())
}

/// Else every vote would count the same, and the tests above would say little.
#[test]
fn votes_that_agree_count_more() -> Result<()> {
    let length = |iterations| {
        let mut values = random(&[9, 12], 3)?.to_vec2::<f64>()?;
        // Eight rows vote for the first capsule alike, the ninth against it.
        (0..9).for_each(|row| values[row][..3].fill(if row < 8 { 0.5 } else { -2.0 }));
        let u = Tensor::new(values, &Device::Cpu)?;
        let (v, _) = forward(&u, &Ragged::new(&[9], &[1])?, Routing { iterations, ..ROUTING })?;
        v.narrow(1, 0, 3)?.sqr()?.sum_all()?.to_scalar::<f64>()
    };
    assert!(length(3)? > 1.2 * length(1)?, "{} {}", length(3)?, length(1)?);
    Ok(())
}

/// At zero squash has value and gradient zero: a sequence, and a capsule beside others that are not.
#[test]
fn nothing_is_divided_by_zero() -> Result<()> {
    let ragged = ragged()?;
    for dtype in [DType::F64, DType::F32] {
        let mut values = random(&[15, 12], 1)?.to_vec2::<f64>()?;
        values.iter_mut().for_each(|row| row[3..6].fill(0.0));
        values[5].fill(0.0);
        let u = Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?;
        let dv = random(&[3, 12], 2)?.to_dtype(dtype)?;
        let (v, saved) = forward(&u, &ragged, ROUTING)?;
        let du = backward(&u, &saved, &dv, &ragged, ROUTING)?;
        let wide = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec2::<f64>();
        let (v, du) = (wide(&v)?, wide(&du)?);
        assert!(v.iter().chain(&du).flatten().all(|x| x.is_finite()));
        assert!(v.iter().chain(&du).all(|row| row[3..6] == [0.0; 3]));
        assert!(v[1].iter().chain(&du[5]).all(|x| *x == 0.0));
        assert!(v[0][0] != 0.0 && du[0][0] != 0.0);
    }
    Ok(())
}

#[test]
fn what_is_not_a_number_stays_in_its_sequence_and_is_not_hidden() -> Result<()> {
    let ragged = ragged()?;
    let mut values = random(&[15, 12], 1)?.to_vec2::<f64>()?;
    values[7][4] = f64::NAN;
    let u = Tensor::new(values, &Device::Cpu)?;
    for u in [&u, &narrow(&[&u])?[0]] {
        let (v, saved) = forward(u, &ragged, ROUTING)?;
        let dv = random(&[3, 12], 2)?.to_dtype(u.dtype())?;
        let du = backward(u, &saved, &dv, &ragged, ROUTING)?;
        let wide = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec2::<f64>();
        let (v, du) = (wide(&v)?, wide(&du)?);
        assert!(v[..2].iter().chain(&du[..6]).flatten().all(|x| x.is_finite()));
        assert!(v[2..].iter().chain(&du[6..]).flatten().all(|x| x.is_nan()), "{v:?} {du:?}");
    }
    Ok(())
}

#[test]
fn any_number_of_threads_and_any_batch_gives_the_same_bits() -> Result<()> {
    let lengths: Vec<usize> = (0..29).map(|i| 1 + i * 17 % 23).collect();
    let ragged = Ragged::new(&lengths, &[3; 29])?;
    let small = narrow(&[&random(&[ragged.tokens(), 12], 1)?, &random(&[29, 12], 2)?])?;
    let run = |u: &Tensor, dv: &Tensor, ragged: &Ragged| {
        let (v, saved) = forward(u, ragged, ROUTING)?;
        let du = backward(u, &saved, dv, ragged, ROUTING)?;
        let bits = |t: &Tensor| {
            let values = t.flatten_all()?.to_vec1::<f32>()?;
            Ok::<_, candle_core::Error>(values.into_iter().map(f32::to_bits).collect())
        };
        Ok::<[Vec<u32>; 2], candle_core::Error>([bits(&v)?, bits(&du)?])
    };
    let with = |threads| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| run(&small[0], &small[1], &ragged))
    };
    let [v, du] = with(1)?;
    for threads in [2, 5] {
        assert!(with(threads)? == [v.clone(), du.clone()], "{threads} threads");
    }
    for i in [0, 7, 28] {
        let rows = ragged.range(i);
        let (u, dv) = (small[0].narrow(0, rows.start, rows.len())?, small[1].narrow(0, i, 1)?);
        let alone = run(&u.copy()?, &dv.copy()?, &Ragged::new(&[rows.len()], &[3])?)?;
        assert_eq!(alone[0], v[i * 12..][..12], "sequence {i}");
        assert_eq!(alone[1], du[rows.start * 12..rows.end * 12], "sequence {i}");
    }
    Ok(())
}

#[test]
fn an_empty_batch_has_no_capsules_and_shapes_that_do_not_fit_are_named() -> Result<()> {
    let empty = Ragged::new(&[], &[])?;
    let nothing = random(&[0, 12], 1)?;
    let (v, saved) = forward(&nothing, &empty, ROUTING)?;
    assert_eq!(v.dims(), [0, 12]);
    assert_eq!(backward(&nothing, &saved, &v, &empty, ROUTING)?.dims(), [0, 12]);
    let ragged = ragged()?;
    let says = |u: &Tensor, routing, said: &str| {
        let error = forward(u, &ragged, routing).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    };
    says(&random(&[15, 11], 1)?, ROUTING, "capsule: u has shape [15, 11], expected [15, 12]");
    let none = Routing { iterations: 0, ..ROUTING };
    says(&random(&[15, 12], 1)?, none, "4 capsules of 3 columns by 0 iterations are none");
    Ok(())
}
