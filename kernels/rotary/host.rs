//! The kernel of op.cu, run on the host, against the CPU implementation in f64.

use candle_core::Result;
use half::bf16;

use super::*;
use crate::{
    common::host_run::{Address, Buffer, Storage, check, in_every_order, kernels, launch, rounded},
    testing::random,
};

#[repr(C)]
struct Rotate {
    x: Address,
    y: Address,
    cosines: Address,
    sines: Address,
    position: Address,
    rows: i32,
    heads: i32,
    half: i32,
    direction: f32,
}

kernels!(Rotate: host_rotary_f32, host_rotary_bf16;);

fn compare<S: Storage>(table: &Table, ragged: &Ragged, heads: usize) -> Result<()> {
    let (t, half) = (ragged.tokens(), table.half);
    let x = rounded::<S>(&random(&[t, heads * 2 * half], 1)?)?;
    let from = Buffer::<S>::tensor(&x)?;
    let narrow = |x: &[f64]| Buffer::of(&x.iter().map(|x| *x as f32).collect::<Vec<_>>());
    let (cosines, sines) = (narrow(&table.cos), narrow(&table.sin));
    let position = Buffer::of(&ragged.token_rows().position);
    for (direction, exact) in
        [(1.0, forward(&x, table, ragged, heads)?), (-1.0, backward(&x, table, ragged, heads)?)]
    {
        let y = Buffer::<S>::poisoned(t * heads * 2 * half);
        let parameters = Rotate {
            x: from.address(),
            y: y.address(),
            cosines: cosines.address(),
            sines: sines.address(),
            position: position.address(),
            rows: t as i32,
            heads: heads as i32,
            half: half as i32,
            direction,
        };
        let kernel = if S::BF16 { host_rotary_bf16 } else { host_rotary_f32 };
        launch(kernel, [(t * heads * half).div_ceil(256), 1, 1], 0, &parameters);
        check("y", &y, &exact, 2e-7)?;
    }
    Ok(())
}

#[test]
fn host_rotation_matches_the_cpu() -> Result<()> {
    let ragged = Ragged::new(&[5, 1, 97], &[4, 3, 2])?;
    in_every_order(|| {
        for (heads, size) in [(1, 2), (3, 6), (2, 64)] {
            let table = Table::new(10_000.0, size, 97)?;
            compare::<f32>(&table, &ragged, heads)?;
            compare::<bf16>(&table, &ragged, heads)?;
        }
        Ok(())
    })
}
