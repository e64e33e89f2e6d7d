//! `kernels/budget.toml`: how much local memory each kernel may use. A kernel that is not entered
//! may not exist, and the other way round.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::resources::Resources;

/// The nvcc that the budget holds for, which `launch/cuda-toolkit` brings. Another allots registers
/// otherwise.
pub const RELEASE: (u32, u32) = (13, 0);

const OPENING: &str = "\
# Local memory that each kernel may use: bytes of its stack frame a thread, and bytes that its
# instructions spill (stores + loads), the larger of sm_80 and sm_90, by nvcc 13.0. The kernel report, and
# CI with it, fails above these. To enter a new kernel: cargo run --release -p allreel-kernel-report -- --record
# Anything but 0 costs speed: say why in the commit that records it.
";

/// What one kernel may use, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    stack: u32,
    spill: u32,
}

/// By kernel.
pub type Budget = BTreeMap<String, Limit>;

/// The file, which must be there.
pub fn read(path: &Path) -> Result<Budget, String> {
    let text = fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}; --record makes it", path.display()))?;
    toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Enters what was measured, and nothing else.
pub fn write(path: &Path, measured: &[Resources]) -> Result<(), String> {
    let mut text = OPENING.to_string();
    for (kernel, Limit { stack, spill }) in used(measured) {
        writeln!(text, "{kernel} = {{ stack = {stack}, spill = {spill} }}").expect("a String");
    }
    fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Where measurement and budget disagree, each with its remedy.
pub fn exceeded(budget: &Budget, measured: &[Resources]) -> Vec<String> {
    let used = used(measured);
    let mut faults = Vec::new();
    for (kernel, Limit { stack, spill }) in &used {
        match budget.get(kernel) {
            None => faults
                .push(format!("{kernel} is not in kernels/budget.toml; enter it with --record")),
            Some(limit) if *stack > limit.stack || *spill > limit.spill => faults.push(format!(
                "{kernel} uses {stack} bytes of stack and spills {spill}, of which \
                 kernels/budget.toml grants {} and {}; use fewer registers, or --record it",
                limit.stack, limit.spill
            )),
            Some(_) => {}
        }
    }
    for kernel in budget.keys().filter(|kernel| !used.contains_key(*kernel)) {
        faults.push(format!("{kernel} of kernels/budget.toml is no kernel; --record drops it"));
    }
    faults
}

/// The larger of the architectures.
fn used(measured: &[Resources]) -> Budget {
    let mut used = Budget::new();
    for kernel in measured {
        let limit = used.entry(kernel.kernel.clone()).or_default();
        limit.stack = limit.stack.max(kernel.stack);
        limit.spill = limit.spill.max(kernel.spill_stores + kernel.spill_loads);
    }
    used
}
