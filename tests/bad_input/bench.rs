//! Sizes, files and devices that `allreel bench` refuses before it measures anything.

use super::{misused, refused};
use crate::run::Workdir;

#[test]
fn bench_refuses_sizes_that_are_none_or_do_not_fit() {
    let dir = Workdir::new();
    for flag in ["tokens", "length", "heads", "head-size", "hidden", "vocabulary", "parameters"] {
        let says = [format!("--{flag} 0"), "from 1".into()];
        refused(&dir, &format!("bench --{flag} 0"), &says.each_ref().map(String::as_str));
    }
    refused(&dir, "bench linear --hidden 9999999999", &["--hidden 9999999999", "to 1073741824"]);
    let says = ["--length 64", "100 tokens", "--tokens 128"];
    refused(&dir, "bench attention --tokens 100 --length 50,64", &says);
    for dropout in ["1", "-0.1", "NaN"] {
        let says = [&format!("--dropout {dropout}")[..], "from 0 to below 1"];
        refused(&dir, &format!("bench norm --dropout={dropout}"), &says);
    }
}

#[test]
fn bench_refuses_what_it_cannot_run_or_find() {
    let dir = Workdir::new();
    let says = ["--filter \"fowrard\"", "norm fwd, norm fwd+bwd"];
    refused(&dir, "bench norm --filter fowrard", &says);
    refused(&dir, "bench --dtype bf16", &["--dtype bf16", "--dtype f32", "--device cuda"]);
    misused(&dir, "bench softmax", &["softmax", "attention", "adamw"]);
    misused(&dir, "bench norm step", &["step", "attention"]);
    misused(&dir, "bench --device tpu", &["tpu", "cuda"]);
    if !cfg!(feature = "cuda") {
        refused(
            &dir,
            "bench --device cuda",
            &["--device cuda", "--features mpi,nccl", "--device cpu"],
        );
    }
}

#[test]
fn bench_refuses_files_before_it_measures() {
    let dir = Workdir::new();
    refused(&dir, "bench --compare gone.json", &["gone.json", "cannot read"]);
    dir.write("broken.json", "{\n  \"format\": 1,\n");
    let says = ["broken.json", "line 3", "allreel bench --json"];
    refused(&dir, "bench --compare broken.json", &says);
    dir.write("other.json", r#"{"accuracy": 0.9}"#);
    let says = ["other.json", "missing field", "allreel bench --json"];
    refused(&dir, "bench --compare other.json", &says);
    refused(&dir, "bench --json nowhere/new.json", &["--json nowhere/new.json", "directory"]);
}
