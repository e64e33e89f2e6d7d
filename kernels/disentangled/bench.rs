//! What the position terms cost: disentangled attention against plain attention of the same shape,
//! forward and backward, alternating. `cargo bench -p allreel-kernels --bench disentangled -- THREADS`.

use std::time::Instant;

use allreel_kernels::{
    Ragged, attention,
    disentangled::{self, Disentangled, Positions},
    threads,
};
use candle_core::{Device, Result, Tensor};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HEAD: usize = 64;

/// Milliseconds of forward and of backward.
type Times = [Vec<f64>; 2];

fn timed<R>(times: &mut Vec<f64>, body: impl FnOnce() -> Result<R>) -> Result<R> {
    let start = Instant::now();
    let result = body()?;
    times.push(start.elapsed().as_secs_f64() * 1e3);
    Ok(result)
}

fn plain(times: &mut Times, ragged: &Ragged, heads: usize, x: &[Tensor; 4]) -> Result<()> {
    let op = attention::Attention {
        ragged,
        heads,
        scale: 0.125,
        span: attention::Span::default(),
        dropout: None,
    };
    let [q, k, v, d_o] = x.clone();
    let (o, lse) = timed(&mut times[0], || attention::forward(op, &q, &k, &v))?;
    let saved = attention::Saved { q, k, v, o, lse };
    timed(&mut times[1], || attention::backward(op, &saved, &d_o))?;
    Ok(())
}

fn disentangled(
    times: &mut Times,
    op: Disentangled<'_>,
    x: &[Tensor; 4],
    tables: &[Tensor; 2],
) -> Result<()> {
    let [q, k, v, d_o] = x.clone();
    let [pk, pq] = tables.clone();
    let run = || disentangled::forward(op, &q, &k, &v, Some(&pk), Some(&pq));
    let (o, lse) = timed(&mut times[0], run)?;
    let saved = disentangled::Saved { q, k, v, pk: Some(pk), pq: Some(pq), o, lse };
    timed(&mut times[1], || disentangled::backward(op, &saved, &d_o, true))?;
    Ok(())
}

fn compare(sequences: usize, len: usize, heads: usize) -> Result<()> {
    let lengths = vec![len; sequences];
    let samples: Vec<u32> = (0..sequences as u32).collect();
    let ragged = Ragged::new(&lengths, &samples)?;
    let positions = Positions::new(Some(256), 512, len);
    let random = |rows: usize| Tensor::randn(0f32, 1f32, (rows, heads * HEAD), &Device::Cpu);
    let t = ragged.tokens();
    let x = [random(t)?, random(t)?, random(t)?, random(t)?];
    let tables = [random(positions.rows().len())?, random(positions.rows().len())?];
    let op =
        Disentangled { ragged: &ragged, heads, scale: 0.07, dropout: None, positions: &positions };
    let mut times: [Times; 2] = Default::default();
    let rounds = (2_000_000_000 / (t * len * heads * HEAD)).clamp(8, 60);
    for _ in 0..rounds {
        plain(&mut times[0], &ragged, heads, &x)?;
        disentangled(&mut times[1], op, &x, &tables)?;
    }
    println!("{sequences} x {len} tokens, {heads} heads x {HEAD}, {rounds} rounds; ms:");
    println!("  {:14} {:>17} {:>17} {:>17}", "min / median", "forward", "backward", "both");
    let [plain, disentangled] = times.map(|[forward, backward]| {
        let both = forward.iter().zip(&backward).map(|(a, b)| a + b).collect();
        [forward, backward, both].map(min_and_median)
    });
    for (name, row) in [("plain", plain), ("disentangled", disentangled)] {
        let cells = row.map(|(min, median)| format!("{min:8.2} {median:8.2}"));
        println!("  {name:14} {} {} {}", cells[0], cells[1], cells[2]);
    }
    let ratios: Vec<String> = plain
        .iter()
        .zip(&disentangled)
        .map(|(a, b)| format!("{:8.2} {:8.2}", b.0 / a.0, b.1 / a.1))
        .collect();
    println!("  {:14} {}", "ratio", ratios.join(" "));
    Ok(())
}

fn min_and_median(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2])
}

fn main() -> Result<()> {
    let count = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(2);
    println!("{} threads", threads::start(count));
    threads::keep_pages();
    compare(16, 128, 4)?;
    compare(4, 512, 12)
}
