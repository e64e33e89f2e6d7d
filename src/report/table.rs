//! The table of epochs shown at the end of a run.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

use super::EpochRecord;
use super::pace::clock;

/// One row per epoch; `best` is the epoch, from 1, marked with a star.
pub fn epochs(records: &[EpochRecord], best: usize) -> String {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header([
        "epoch",
        "train acc",
        "train loss",
        "val acc",
        "val loss",
        "samples/s",
        "time",
    ]);
    for record in records {
        // A blank where there is no star keeps the numbers in line.
        let mark = if record.epoch == best { '*' } else { ' ' };
        table.add_row([
            format!("{}{mark}", record.epoch),
            format!("{:.4}", record.train_accuracy),
            format!("{:.4}", record.train_loss),
            format!("{:.4}", record.val_accuracy),
            format!("{:.4}", record.val_loss),
            format!("{:.1}", record.samples_per_second),
            clock(record.seconds),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: usize, val_accuracy: f64) -> EpochRecord {
        EpochRecord {
            step: epoch * 10,
            epoch,
            train_accuracy: 0.91,
            train_loss: 0.25,
            val_accuracy,
            val_loss: 0.5,
            learning_rate: 1e-5,
            samples_per_second: 12.34,
            tokens_per_second: 1234.0,
            seconds: 65.4,
        }
    }

    #[test]
    fn every_epoch_has_a_row_and_the_best_a_star() {
        let table = epochs(&[record(9, 0.8), record(10, f64::NAN)], 9);
        let rows: Vec<Vec<&str>> = table
            .lines()
            .filter(|line| line.contains('┆'))
            .map(|line| line.trim_matches('│').split('┆').map(str::trim).collect())
            .collect();
        assert_eq!(
            rows,
            [
                ["epoch", "train acc", "train loss", "val acc", "val loss", "samples/s", "time"],
                ["9*", "0.9100", "0.2500", "0.8000", "0.5000", "12.3", "00:01:05"],
                ["10", "0.9100", "0.2500", "NaN", "0.5000", "12.3", "00:01:05"],
            ],
            "\n{table}"
        );
        assert_eq!(table.matches('*').count(), 1, "\n{table}");
    }
}
