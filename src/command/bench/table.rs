//! The table of a run, as docs/bench/README.md explains it.

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};

use super::{
    ceiling::Bound,
    compare::{Change, Comparison},
    record::{Record, Report},
};

/// The machine and its ceilings, the cases, and what a comparison adds to them.
pub fn render(report: &Report, comparison: Option<&Comparison>) -> String {
    let plain = report.cases.iter().any(|case| case.times_plain.is_some());
    let mut header = vec![
        "case",
        "sizes",
        "ms",
        "p20 - p80",
        "wall ms",
        "runs",
        "GB/s",
        "GFLOP/s",
        "% of limit",
    ];
    let memory = report.cases.iter().any(|case| case.peak_bytes.is_some());
    if memory {
        header.push("MiB");
    }
    if plain {
        header.push("x plain");
    }
    if comparison.is_some() {
        header.extend(["old ms", "new / old", "verdict"]);
    }
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    for (i, case) in report.cases.iter().enumerate() {
        let mut row = cells(case);
        if memory {
            let mebi = |bytes: u64| format!("{:.0}", bytes as f64 / (1u64 << 20) as f64);
            row.push(case.peak_bytes.map_or_else(String::new, mebi));
        }
        if plain {
            row.push(case.times_plain.map_or_else(String::new, |x| format!("{:.2}", x.median)));
        }
        if let Some(comparison) = comparison {
            row.extend(changed(comparison.cases[i]));
        }
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("{}\n{table}\n", heading(report));
    if let Some(comparison) = comparison {
        if let Some(first) = comparison.gone.first() {
            let count = comparison.gone.len();
            text += &format!("only in the older run: {count} case(s), the first {first}\n");
        }
        for what in &comparison.differs {
            text += &format!("not like for like: {what}\n");
        }
    }
    text
}

fn heading(report: &Report) -> String {
    let (machine, settings) = (&report.machine, &report.settings);
    let caches = match settings.flushed_bytes {
        0 => "caches left warm".to_owned(),
        bytes => format!("caches emptied with {:.0} MB between runs", bytes as f64 / 1e6),
    };
    let device = match machine.device.as_str() {
        "cpu" => format!("{}, {} threads", machine.processor, machine.threads),
        gpu => gpu.to_owned(),
    };
    format!(
        "{device}, {}; ceilings: copy {:.1} GB/s, GEMM {:.0} GFLOP/s; {caches}",
        settings.dtype,
        report.ceilings.bytes_per_second / 1e9,
        report.ceilings.flops_per_second / 1e9,
    )
}

fn cells(case: &Record) -> Vec<String> {
    let kernel = &case.kernel_ms;
    let flops = match case.flops_per_second {
        0.0 => String::new(),
        flops => format!("{:.0}", flops / 1e9),
    };
    let bound = match case.limited_by {
        Bound::Copy => "copy",
        Bound::Gemm => "GEMM",
    };
    vec![
        case.name.clone(),
        case.sizes.clone(),
        ms(kernel.median),
        format!("{} - {}", ms(kernel.p20), ms(kernel.p80)),
        ms(case.wall_ms.median),
        case.runs.to_string(),
        format!("{:.1}", case.bytes_per_second / 1e9),
        flops,
        format!("{:.0} {bound}", 100.0 * case.share_of_limit),
    ]
}

fn changed(change: Option<Change>) -> [String; 3] {
    let Some(Change { old_ms, ratio: [ratio, low, high], verdict }) = change else {
        return [String::new(), String::new(), "new".into()];
    };
    [ms(old_ms), format!("{ratio:.2} ({low:.2} - {high:.2})"), verdict.name().into()]
}

/// Milliseconds with about three digits.
fn ms(value: f64) -> String {
    match value {
        x if x < 1.0 => format!("{x:.4}"),
        x if x < 10.0 => format!("{x:.3}"),
        x if x < 100.0 => format!("{x:.2}"),
        x => format!("{x:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::record::tests::report, *};

    fn rows(text: &str) -> Vec<Vec<&str>> {
        let lines = text.lines().filter(|line| line.contains('┆'));
        lines.map(|line| line.trim_matches('│').split('┆').map(str::trim).collect()).collect()
    }

    #[test]
    fn every_case_has_a_row_and_a_comparison_its_columns() {
        let mut new = report(&[("a", [1.0, 5.0, 6.0, 7.0]), ("b", [0.1, 0.2, 0.5, 123.45])]);
        new.cases[1].times_plain = None;
        new.cases[1].flops_per_second = 0.0;
        let text = render(&new, None);
        let a =
            ["a", "4 x 4", "6.000", "5.000 - 7.000", "6.000", "1", "1.7", "500", "50 GEMM", "6.00"];
        let b =
            ["b", "4 x 4", "0.5000", "0.2000 - 123.5", "0.5000", "1", "20.0", "", "600 GEMM", ""];
        assert_eq!(rows(&text)[1..], [a, b], "\n{text}");
        assert!(text.contains("copy 10.0 GB/s, GEMM 1000 GFLOP/s"), "{text}");

        let old = report(&[("a", [1.0, 10.0, 12.0, 14.0]), ("c", [1.0; 4])]);
        let text = render(&new, Some(&Comparison::new(&old, &new)));
        let rows = rows(&text);
        assert_eq!(rows[0][10..], ["old ms", "new / old", "verdict"], "\n{text}");
        assert_eq!(rows[1][10..], ["12.00", "0.50 (0.36 - 0.70)", "faster"], "\n{text}");
        assert_eq!(rows[2][10..], ["", "", "new"], "\n{text}");
        assert!(text.ends_with("only in the older run: 1 case(s), the first c, 4 x 4\n"), "{text}");
    }
}
