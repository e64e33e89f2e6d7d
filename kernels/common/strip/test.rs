use pulp::Scalar;

use super::*;

/// Small whole numbers: their sums are exact in any order.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + seed) * 2_654_435_761 % 97 % 9) as f32 - 4.0).collect()
}

/// Runs a kernel on every vector unit of this machine, from 1.0 everywhere.
fn on_each_unit<K: WithSimd>(size: usize, kernel: impl Fn(*mut f32) -> K) -> Vec<Vec<f32>> {
    let mut results = vec![vec![1.0f32; size]; 2];
    Scalar::new().vectorize(kernel(results[0].as_mut_ptr()));
    Arch::new().dispatch(kernel(results[1].as_mut_ptr()));
    #[cfg(target_arch = "x86_64")]
    if let Some(v3) = pulp::x86::V3::try_new() {
        let mut result = vec![1.0f32; size];
        Simd::vectorize(v3, kernel(result.as_mut_ptr()));
        results.push(result);
    }
    results
}

#[test]
fn strips_are_products_on_every_vector_unit() {
    const DEPTH: usize = 5;
    for columns in (LANES..=9 * LANES).step_by(LANES) {
        let (a, b) = (numbers(ROWS * DEPTH, 1), numbers(DEPTH * columns, 2));
        let product = |accumulate| {
            let (a, b) = (a.as_ptr(), b.as_ptr());
            move |start| Strip {
                product: Product {
                    start,
                    stride: columns,
                    accumulate,
                    a,
                    a_stride: 1,
                    a_step: ROWS as isize,
                    b,
                    b_step: columns as isize,
                    depth: DEPTH,
                },
                columns,
            }
        };
        for accumulate in [false, true] {
            let want = |i: usize| {
                let (row, column) = (i / columns, i % columns);
                let terms = (0..DEPTH).map(|k| a[k * ROWS + row] * b[k * columns + column]);
                terms.sum::<f32>() + f32::from(u8::from(accumulate))
            };
            let want: Vec<f32> = (0..ROWS * columns).map(want).collect();
            for got in on_each_unit(ROWS * columns, product(accumulate)) {
                assert_eq!(got, want, "{columns} columns, accumulate {accumulate}");
            }
        }
    }
}

#[test]
fn slides_are_products_along_diagonals_on_every_vector_unit() {
    const DEPTH: usize = 3;
    for (rows, columns) in [(1, 16), (15, 48), (17, 64), (40, 32), (97, 112), (130, 16)] {
        let width = rows + columns;
        let (a, b) = (numbers(DEPTH * columns, 3), numbers(DEPTH * width, 4));
        let slide = |start| Slide {
            product: Product {
                start,
                stride: columns,
                accumulate: true,
                a: a.as_ptr(),
                a_stride: 0,
                a_step: columns as isize,
                b: b[rows..].as_ptr(),
                b_step: width as isize,
                depth: DEPTH,
            },
            rows,
            columns,
        };
        let want = |i: usize| {
            let (row, column) = (i / columns, i % columns);
            let term = |k| a[k * columns + column] * b[k * width + rows + column - row];
            1.0 + (0..DEPTH).map(term).sum::<f32>()
        };
        let want: Vec<f32> = (0..rows * columns).map(want).collect();
        for got in on_each_unit(rows * columns, slide) {
            assert_eq!(got, want, "{rows} rows, {columns} columns");
        }
    }
}

#[test]
#[should_panic(expected = "a strip reads")]
fn an_operand_that_is_too_short_is_refused() {
    let (a, b, mut dst) = ([0f32; ROWS], [0f32; 2 * LANES - 1], [0f32; ROWS * LANES]);
    let a = Walk { values: &a, at: 0, stride: 1, step: 0 };
    let b = Walk { values: &b, at: 0, stride: 0, step: LANES as isize };
    let dst = Rows { values: &mut dst, at: 0, stride: LANES, accumulate: false };
    strip(dst, a, b, 2, LANES);
}
