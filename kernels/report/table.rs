//! The table: one row a kernel, a value for each architecture where they differ.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

use crate::resources::Resources;

/// A column: its name, and what it shows of a kernel.
type Column = (&'static str, fn(&Resources) -> u32);

const COLUMNS: [Column; 5] = [
    ("registers", |kernel| kernel.registers),
    ("static shared", |kernel| kernel.shared),
    ("stack", |kernel| kernel.stack),
    ("spill stores", |kernel| kernel.spill_stores),
    ("spill loads", |kernel| kernel.spill_loads),
];

/// Rows and, within a cell, architectures are sorted by name.
pub fn resources(measured: &[Resources]) -> String {
    let targets = names(measured.iter().map(|kernel| &kernel.target));
    let mut table = Table::new();
    let first = format!("kernel ({}; bytes)", targets.join(" / "));
    let header = std::iter::once(first).chain(COLUMNS.map(|(name, _)| name.to_string()));
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    for name in names(measured.iter().map(|kernel| &kernel.kernel)) {
        let mut row: Vec<&Resources> =
            measured.iter().filter(|kernel| kernel.kernel == name).collect();
        row.sort_by_key(|kernel| &kernel.target);
        let cells = COLUMNS.map(|(_, of)| {
            let mut values: Vec<u32> = row.iter().map(|kernel| of(kernel)).collect();
            values.dedup();
            values.iter().map(u32::to_string).collect::<Vec<_>>().join(" / ")
        });
        table.add_row(std::iter::once(name.to_string()).chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Sorted, each once.
fn names<'a>(all: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
    let mut names: Vec<&str> = all.map(String::as_str).collect();
    names.sort_unstable();
    names.dedup();
    names
}
