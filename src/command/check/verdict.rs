//! The table of a check, and whether all is well.

use allreel_kernels::common::check::Finding;
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};

use super::Report;
use crate::{Error, Result};

/// One row for each thing that was checked, what failed in full, and the remarks.
pub(super) fn render(report: &Report) -> String {
    let mut table = Table::new();
    let header = ["checked", "comparisons", "worst / allowed", "verdict"];
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    // An op's findings of both sizes lie together.
    for findings in report.findings.chunk_by(|a, b| a.room == b.room) {
        let failed = findings.iter().filter(|finding| !finding.ok()).count();
        table.add_row([
            findings[0].room.to_owned(),
            findings.len().to_string(),
            format!("{:.2}", worst(findings)),
            if failed == 0 { "ok".into() } else { format!("{failed} FAILED") },
        ]);
    }
    for column in table.column_iter_mut().skip(1).take(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("{table}\n");
    for finding in report.findings.iter().filter(|finding| !finding.ok()) {
        text += &format!("FAILED  {finding}\n");
    }
    for remark in &report.remarks {
        text += &format!("{remark}\n");
    }
    text
}

/// The worst share of what is allowed; NaN if there is one.
fn worst(findings: &[Finding]) -> f64 {
    let larger = |m: f64, x: f64| if m.is_nan() || x <= m { m } else { x };
    findings.iter().map(Finding::share).fold(0.0, larger)
}

/// # Errors
/// `Device`, naming the first finding that is not ok; `Bug` if there is none at all.
pub(super) fn verdict(findings: &[Finding]) -> Result<()> {
    if findings.is_empty() {
        return Err(Error::Bug("nothing was compared".into()));
    }
    let mut failed = findings.iter().filter(|finding| !finding.ok());
    let Some(first) = failed.next() else { return Ok(()) };
    Err(Error::Device(format!(
        "{} of {} comparisons failed, the first: {first}. Do not train here; report it with the output of \
         this command",
        failed.count() + 1,
        findings.len()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(room: &'static str, worst: f64) -> Finding {
        Finding { room, what: "y (some case)".into(), worst, allowed: 2.0 }
    }

    #[test]
    fn what_is_not_a_number_fails_the_command_and_is_shown() {
        let good = || vec![finding("norm", 1.0), finding("norm", 2.0)];
        assert!(verdict(&good()).is_ok());
        for bad in [f64::NAN, f64::INFINITY, 2.1] {
            let mut findings = good();
            findings.extend([finding("linear", bad), finding("linear", 0.5)]);
            let error = verdict(&findings).expect_err("a failure");
            assert_eq!(error.exit_code(), 3);
            let text = error.to_string();
            assert!(text.contains("1 of 4") && text.contains("linear: y (some case)"), "{text}");
            let shown = render(&Report { findings, remarks: vec!["a remark".into()] });
            assert_eq!(shown.matches("FAILED").count(), 2, "{shown}");
            assert!(shown.contains("a remark\n"), "{shown}");
            let rows: Vec<&str> = shown.lines().filter(|line| line.contains('┆')).collect();
            assert!(rows[1].contains("norm") && rows[1].contains("ok"), "{shown}");
            assert!(rows[2].contains("linear") && rows[2].contains("1 FAILED"), "{shown}");
        }
        assert_eq!(verdict(&[]).expect_err("nothing").exit_code(), 70);
    }
}
