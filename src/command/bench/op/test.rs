//! Formulas against values counted by hand.

use allreel_kernels::{disentangled::Positions, recurrence::Cell};

use super::*;

/// Two sequences of two tokens, two heads of one.
fn sizes() -> Sizes {
    Sizes {
        tokens: 4,
        lengths: vec![2],
        heads: 2,
        head_size: 1,
        hidden: 3,
        vocabulary: 5,
        parameters: 7,
        dropout: 0.0,
    }
}

#[test]
fn attention_counts_its_products() {
    // 2 sequences x 2 heads x 2 x 2 pairs = 16 pairs, 2 FLOP each, 2 products forward and 5 backward.
    // A [4, 2] operand in bf16 has 16 bytes, lse 8 numbers of 4.
    let work = |pass| attention::work(&sizes(), 2.0, 2, pass);
    assert_eq!(work(Pass::Forward), Work { bytes: 4.0 * 16.0 + 32.0, flops: 64.0 });
    assert_eq!(work(Pass::Both), Work { bytes: 12.0 * 16.0 + 64.0, flops: 224.0 });
}

#[test]
fn positions_count_each_row_once_for_each_token() {
    // Distances -2..=2 read rows 0 0 1 1 1; queries 0, 1, 2 see 0..=-2, 1..=-1, 2..=0.
    let clamped = Positions::new(None, 1, 3);
    assert_eq!(disentangled::rows_read(&clamped, 3), 2 + 2 + 1);
    assert_eq!(disentangled::rows_read(&Positions::new(None, 9, 1), 1), 1);
    let mut naive = 0;
    let buckets = Positions::new(Some(8), 32, 100);
    for i in 0..100 {
        let slots: std::collections::BTreeSet<usize> =
            (0..100).map(|j| buckets.slot(i - j)).collect();
        naive += slots.len();
    }
    assert_eq!(disentangled::rows_read(&buckets, 100), naive);
}

#[test]
fn disentangled_attention_adds_the_positions() {
    // Each query reads 2 rows: 2 sequences x 4 pairs x width 2 x 2 FLOP x 2 tables = 64, three more
    // times backward. Distances -1, 0, 1 have 3 rows; two tables of [3, 2] in f32 have 48 bytes.
    let positions = Positions::new(None, 9, 2);
    let extra = |pass| {
        let all = disentangled::work(&sizes(), 4.0, 2, &positions, pass);
        let plain = attention::work(&sizes(), 4.0, 2, pass);
        (all.bytes - plain.bytes, all.flops - plain.flops)
    };
    assert_eq!(extra(Pass::Forward), (48.0, 64.0));
    assert_eq!(extra(Pass::Both), (3.0 * 48.0, 4.0 * 64.0));
}

#[test]
fn linears_count_operands_and_gradients() {
    // x [5, 2], W [3, 2], b [3], y [5, 3] in bf16: 20, 12, 12 (f32), 30 bytes; 2 x 5 x 2 x 3 FLOP.
    let [forward, input, parameters] = linear::works(5, 2, 3, 2.0);
    assert_eq!(forward, Work { bytes: 74.0, flops: 60.0 });
    assert_eq!(input, Work { bytes: 62.0, flops: 60.0 });
    // dy twice, x, and 6 + 3 gradients of 4 bytes read and written.
    assert_eq!(parameters, Work { bytes: 2.0 * 30.0 + 20.0 + 72.0, flops: 60.0 });
    let square = linear::works(5, 2, 2, 2.0);
    let both = projections::work(5, 2, 2.0, Pass::Both);
    assert_eq!(both, (square[0] + square[1] + square[2]) * 3.0);
    let rows = projections::work_of_rows(5, 2, 2.0, Pass::Both);
    assert_eq!(rows, (square[0] + square[2]) * 2.0);
}

#[test]
fn recurrences_count_both_directions() {
    // T 5, K 2, H 3 in bf16; an LSTM has gates [5, 12]: 120 bytes, h 30, c 60 (f32), W_hh [12, 3] 72, b 48;
    // 2 x 5 x 12 x 3 FLOP a product with W_hh, once forward and twice backward.
    let [forward, input, parameters] = linear::works(5, 2, 12, 2.0);
    let steps = Work { bytes: 240.0 + 72.0 + 48.0 + 30.0 + 60.0, flops: 360.0 };
    let lstm = |pass| recurrence::work(5, 2, 3, Cell::Lstm, 2.0, pass);
    assert_eq!(lstm(Pass::Forward), (forward + steps) * 2.0);
    // dh as well; gradients of W_hh and b_hh read and written in f32: 288 + 96.
    let back = Work { bytes: 240.0 + 72.0 + 60.0 + 60.0 + 384.0, flops: 720.0 };
    assert_eq!(lstm(Pass::Both), (forward + steps + input + parameters + back) * 2.0);
    // Of a GRU's nine rows: 2 x 5 x 9 x (2 + 3) FLOP forward.
    assert_eq!(recurrence::work(5, 2, 3, Cell::Gru, 2.0, Pass::Forward).flops, 2.0 * 450.0);
}

#[test]
fn frozen_linears_count_their_weights_as_they_are_kept() {
    // x [5, 64] and y [5, 3] in bf16: 670 bytes; 2 x 5 x 64 x 3 FLOP, and as many again backward.
    let work = |format, pass| quantized::work(5, (64, 3), 2.0, format, pass);
    let plain = work(quantized::Format::Plain, Pass::Forward);
    assert_eq!(plain, Work { bytes: 670.0 + 384.0, flops: 1920.0 });
    assert_eq!(work(quantized::Format::Plain, Pass::Both), plain * 2.0);
    assert_eq!(work(quantized::Format::Int8, Pass::Forward).bytes, 670.0 + 192.0 + 12.0);
    // 96 bytes of codes, 3 of scales, 3/256 of a float for those.
    let four_bit = work(quantized::Format::Nf4, Pass::Forward).bytes;
    assert!((four_bit - (670.0 + 96.0 + 3.0 + 12.0 / 256.0)).abs() < 1e-9, "{four_bit}");
}

#[test]
fn elementwise_ops_count_bytes() {
    let bytes = |bytes| Work { bytes, flops: 0.0 };
    // [2, 3] in bf16: 12 bytes; two moments of 2 rows: 16; a vector: 12.
    assert_eq!(norm::work(2, 3, 2.0, false, Pass::Forward), bytes(48.0 + 16.0 + 36.0));
    let backward = 36.0 + 16.0 + 12.0 + 72.0;
    assert_eq!(norm::work(2, 3, 2.0, false, Pass::Both), bytes(100.0 + backward));
    assert_eq!(norm::work(2, 3, 2.0, true, Pass::Both), bytes(100.0 + backward + 12.0));
    // y [2, 3] in f32: 24 bytes; h as much, or twice; b 12 or 24.
    assert_eq!(activation::work(2, 3, 4.0, false, Pass::Forward), bytes(60.0));
    assert_eq!(activation::work(2, 3, 4.0, false, Pass::Both), bytes(60.0 + 72.0 + 36.0));
    assert_eq!(activation::work(2, 3, 4.0, true, Pass::Forward), bytes(96.0));
    assert_eq!(activation::work(2, 3, 4.0, true, Pass::Both), bytes(96.0 + 120.0 + 72.0));
    // 4 ids, 4 rows of 3 in bf16 read and written; backward 2 distinct ones in f32.
    assert_eq!(embedding::work(4, 3, 2, 2.0, Pass::Forward), bytes(16.0 + 48.0));
    assert_eq!(embedding::work(4, 3, 2, 2.0, Pass::Both), bytes(64.0 + 16.0 + 24.0 + 8.0 + 24.0));
    assert_eq!(adamw::step_work(7), bytes(224.0));
    assert_eq!(adamw::norm_work(7), bytes(28.0));
}
