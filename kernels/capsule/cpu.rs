//! Capsules on the CPU: one task per sequence, its tokens in order.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Routing;
use crate::{
    common::{
        Ragged, Real,
        host::{Scatter, read, tensor, unwritten},
        real::{softmax, sum_by},
        simd,
    },
    linear::add,
};

/// v and s of every iteration.
pub(super) fn forward<T: Real>(
    u: &Tensor,
    ragged: &Ragged,
    routing: Routing,
) -> Result<(Tensor, Tensor)> {
    let (b, columns) = (ragged.sequences(), routing.columns());
    let all = routing.iterations * columns;
    let u = read::<T>(u)?;
    let (mut v, mut sums) = (unwritten::<T>(b * columns), unwritten::<T>(b * all));
    v.par_chunks_mut(columns).zip(sums.par_chunks_mut(all)).enumerate().for_each(
        |(i, (v, sums))| {
            let rows = ragged.range(i);
            simd(
                #[inline(always)]
                || route(v, sums, &u[rows.start * columns..rows.end * columns], routing),
            );
        },
    );
    Ok((tensor(v, (b, columns))?, tensor(sums, (b, all))?))
}

#[inline(always)]
fn route<T: Real>(v: &mut [T], sums: &mut [T], u: &[T], routing: Routing) {
    let (columns, size) = (routing.columns(), routing.size);
    // b of a row is its votes times what was found so far.
    let (mut found, mut c) = (vec![T::ZERO; columns], vec![T::ZERO; routing.capsules]);
    for s in sums.chunks_exact_mut(columns) {
        s.fill(T::ZERO);
        for u in u.chunks_exact(columns) {
            couple(&mut c, u, &found, size);
            for (j, c) in c.iter().enumerate() {
                add_scaled(&mut s[j * size..][..size], *c, &u[j * size..][..size]);
            }
        }
        squash(v, s, size);
        add(&mut found, v);
    }
}

/// The products of each capsule's columns.
#[inline(always)]
fn products<T: Real>(to: &mut [T], a: &[T], b: &[T], size: usize) {
    for (to, (a, b)) in to.iter_mut().zip(a.chunks_exact(size).zip(b.chunks_exact(size))) {
        *to = sum_by(size, |d| a[d] * b[d]);
    }
}

/// c of a row.
#[inline(always)]
fn couple<T: Real>(c: &mut [T], u: &[T], found: &[T], size: usize) {
    products(c, u, found, size);
    softmax(c);
}

/// `sum += scale·row`.
#[inline(always)]
fn add_scaled<T: Real>(sum: &mut [T], scale: T, row: &[T]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum = scale.fma(*value, *sum);
    }
}

#[inline(always)]
fn squash<T: Real>(v: &mut [T], s: &[T], size: usize) {
    for (v, s) in v.chunks_exact_mut(size).zip(s.chunks_exact(size)) {
        let square = sum_by(size, |d| s[d] * s[d]);
        let factor = square.sqrt() / (T::ONE + square);
        for (v, s) in v.iter_mut().zip(s) {
            *v = factor * *s;
        }
    }
}

#[inline(always)]
fn squash_backward<T: Real>(ds: &mut [T], s: &[T], dv: &[T], size: usize) {
    let of_capsules = s.chunks_exact(size).zip(dv.chunks_exact(size));
    for (ds, (s, dv)) in ds.chunks_exact_mut(size).zip(of_capsules) {
        let square = sum_by(size, |d| s[d] * s[d]);
        let (length, inverse) = (square.sqrt(), T::ONE / (T::ONE + square));
        let along = sum_by(size, |d| s[d] * dv[d]);
        // Where s is zero squash is flat. Not `square > 0`, which would hide a NaN.
        let slope = if square == T::ZERO {
            T::ZERO
        } else {
            (T::ONE - square) * inverse * inverse * along / length
        };
        for ((ds, s), dv) in ds.iter_mut().zip(s).zip(dv) {
            *ds = (length * inverse).fma(*dv, slope * *s);
        }
    }
}

pub(super) fn backward<T: Real>(
    u: &Tensor,
    sums: &Tensor,
    dv: &Tensor,
    ragged: &Ragged,
    routing: Routing,
) -> Result<Tensor> {
    let (t, columns) = (ragged.tokens(), routing.columns());
    let (u, sums, dv) = (read::<T>(u)?, read::<T>(sums)?, read::<T>(dv)?);
    let mut du = unwritten::<T>(t * columns);
    let out = Scatter::new(&mut du);
    let of_sequences = dv.par_chunks(columns).zip(sums.par_chunks(routing.iterations * columns));
    of_sequences.enumerate().for_each(|(i, (dv, sums))| {
        let rows = ragged.range(i);
        // SAFETY: the rows of a sequence belong to its task alone.
        let du = unsafe { out.slice(rows.start * columns, rows.len() * columns) };
        simd(
            #[inline(always)]
            || route_back(du, &u[rows.start * columns..rows.end * columns], sums, dv, routing),
        );
    });
    tensor(du, (t, columns))
}

#[inline(always)]
fn route_back<T: Real>(du: &mut [T], u: &[T], sums: &[T], dv: &[T], routing: Routing) {
    let (columns, size, capsules) = (routing.columns(), routing.size, routing.capsules);
    let mut dv = dv.to_vec();
    let [mut found, mut before, mut ds] = [(); 3].map(|()| vec![T::ZERO; columns]);
    let [mut c, mut dc] = [(); 2].map(|()| vec![T::ZERO; capsules]);
    let mut db = vec![T::ZERO; u.len() / size];
    du.fill(T::ZERO);
    for iteration in (0..routing.iterations).rev() {
        let (earlier, own) = sums.split_at(iteration * columns);
        squash_backward(&mut ds, &own[..columns], &dv, size);
        found.fill(T::ZERO);
        before.fill(T::ZERO);
        for s in earlier.chunks_exact(columns) {
            squash(&mut before, s, size);
            add(&mut found, &before);
        }
        dv.fill(T::ZERO);
        let rows = du.chunks_exact_mut(columns).zip(u.chunks_exact(columns));
        for ((du, u), db) in rows.zip(db.chunks_exact_mut(capsules)) {
            couple(&mut c, u, &found, size);
            // The b of the first iteration are no variables.
            if iteration > 0 {
                products(&mut dc, u, &ds, size);
                let mean = sum_by(capsules, |j| c[j] * dc[j]);
                for j in 0..capsules {
                    db[j] += c[j] * (dc[j] - mean);
                    add_scaled(&mut dv[j * size..][..size], db[j], &u[j * size..][..size]);
                    add_scaled(&mut du[j * size..][..size], db[j], &before[j * size..][..size]);
                }
            }
            for (j, c) in c.iter().enumerate() {
                add_scaled(&mut du[j * size..][..size], *c, &ds[j * size..][..size]);
            }
        }
    }
}
