//! What each kernel takes of a multiprocessor, read from what `ptxas -v` prints.

/// One kernel on one architecture. All are per thread but `shared`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub kernel: String,
    /// `sm_80`, `sm_90`.
    pub target: String,
    /// Registers.
    pub registers: u32,
    /// Bytes of shared memory of a block that are known at compile time; dynamic ones come on top.
    pub shared: u32,
    /// Bytes of the stack frame: what was spilled, and arrays that found no place in registers.
    pub stack: u32,
    /// Bytes that instructions write to the stack for want of registers.
    pub spill_stores: u32,
    /// Bytes that instructions read back.
    pub spill_loads: u32,
}

/// One entry for each kernel and architecture, in the order of the log. A function that was not
/// inlined counts towards the kernel that it was compiled with.
pub fn parse(log: &str) -> Result<Vec<Resources>, String> {
    let mut all: Vec<Resources> = Vec::new();
    for line in log.lines() {
        let fault = || format!("ptxas printed what is not understood: {line:?}");
        if let Some((_, entry)) = line.split_once("Compiling entry function '") {
            let (kernel, rest) = entry.split_once("' for '").ok_or_else(fault)?;
            let (kernel, target) = (kernel.to_string(), rest.trim_end_matches('\'').to_string());
            all.push(Resources { kernel, target, ..Default::default() });
            continue;
        }
        let Some(kernel) = all.last_mut() else { continue };
        if line.contains(" bytes stack frame") {
            kernel.stack = kernel.stack.max(before(line, " bytes stack frame").ok_or_else(fault)?);
            kernel.spill_stores += before(line, " bytes spill stores").ok_or_else(fault)?;
            kernel.spill_loads += before(line, " bytes spill loads").ok_or_else(fault)?;
        } else if line.contains(" registers") {
            kernel.registers = before(line, " registers").ok_or_else(fault)?;
            kernel.shared = before(line, " bytes smem").unwrap_or(0);
        }
    }
    match all.iter().find(|kernel| kernel.registers == 0) {
        Some(kernel) => Err(format!("ptxas says nothing of {}'s registers", kernel.kernel)),
        None => Ok(all),
    }
}

/// The number right before `unit`.
fn before(line: &str, unit: &str) -> Option<u32> {
    let (text, _) = line.split_once(unit)?;
    text.rsplit([' ', '\t']).next()?.parse().ok()
}
