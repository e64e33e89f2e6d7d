//! The report on a log as ptxas prints it.

use crate::budget::{Budget, exceeded, read, write};
use crate::resources::{Resources, parse};
use crate::table;

const LOG: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scale_f32' for 'sm_80'
ptxas info    : Function properties for scale_f32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8192 bytes smem, 408 bytes cmem[0]
ptxas info    : Compile time = 48.791 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scale_f32' for 'sm_90'
ptxas info    : Function properties for _Z6helperPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for scale_f32
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
";

fn resources() -> Vec<Resources> {
    parse(LOG).unwrap()
}

fn budget(text: &str) -> Budget {
    toml::from_str(text).unwrap()
}

#[test]
fn the_log_of_ptxas_is_read_kernel_by_kernel() {
    let of = |target: &str, [registers, shared, stack, spill_stores, spill_loads]: [u32; 5]| {
        let (kernel, target) = ("scale_f32".to_string(), target.to_string());
        Resources { kernel, target, registers, shared, stack, spill_stores, spill_loads }
    };
    let expected = [of("sm_80", [40, 8192, 0, 0, 0]), of("sm_90", [255, 0, 16, 24, 36])];
    assert_eq!(resources(), expected);
}

#[test]
fn a_log_of_another_form_is_refused() {
    let (cut, _) = LOG.rsplit_once("ptxas info    : Used").unwrap();
    assert!(parse(cut).unwrap_err().contains("scale_f32's registers"));
    let changed = LOG.replace("0 bytes spill stores", "no spill stores");
    assert!(parse(&changed).unwrap_err().contains("not understood"));
}

#[test]
fn a_kernel_is_held_to_its_budget_on_the_worse_architecture() {
    let faults = |text: &str| exceeded(&budget(text), &resources());
    assert!(faults("scale_f32 = { stack = 16, spill = 60 }").is_empty());
    let spills = faults("scale_f32 = { stack = 16, spill = 59 }");
    assert_eq!(spills.len(), 1);
    assert!(spills[0].contains("scale_f32 uses 16 bytes of stack and spills 60"), "{spills:?}");
    assert_eq!(faults("scale_f32 = { stack = 15, spill = 60 }").len(), 1);
}

#[test]
fn kernels_and_budget_must_name_each_other() {
    let faults = exceeded(&budget("other = { stack = 0, spill = 0 }"), &resources());
    assert_eq!(faults.len(), 2);
    assert!(faults[0].contains("scale_f32 is not in"), "{faults:?}");
    assert!(faults[1].contains("other of kernels/budget.toml is no kernel"), "{faults:?}");
}

#[test]
fn what_is_recorded_is_met() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("budget.toml");
    assert!(read(&path).unwrap_err().contains("--record"));
    write(&path, &resources()).unwrap();
    let recorded = read(&path).unwrap();
    assert_eq!(recorded, budget("scale_f32 = { stack = 16, spill = 60 }"));
    assert!(exceeded(&recorded, &resources()).is_empty());
}

#[test]
fn the_table_shows_both_architectures_where_they_differ() {
    let table = table::resources(&resources());
    let row = table.lines().find(|line| line.contains("scale_f32")).unwrap();
    let cells: Vec<&str> = row.trim_matches('│').split('┆').map(str::trim).collect();
    assert_eq!(cells, ["scale_f32", "40 / 255", "8192 / 0", "0 / 16", "0 / 24", "0 / 36"]);
}
