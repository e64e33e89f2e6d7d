//! `allreel bench`: every case runs, the figures hang together, and a run compares with itself.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{keys, number};
use crate::run::Workdir;

/// Sizes at which all cases take no time.
const TINY: &str = "--tokens 32 --length 8,32 --heads 2 --head-size 8 --hidden 16 --vocabulary 50 \
                    --parameters 1000 --threads 1 --warmup 0 --budget 0";

fn bench(dir: &Workdir, args: &str) -> (String, Value) {
    let shown = dir.allreel(&format!("bench {args} --json out.json")).ok();
    (shown.out, serde_json::from_str(&dir.read("out.json")).expect("JSON"))
}

fn names(report: &Value) -> Vec<&str> {
    let cases = report["cases"].as_array().expect("cases");
    cases.iter().map(|case| case["name"].as_str().expect("a name")).collect()
}

#[test]
fn bench_runs_every_case_and_says_what_it_measured() {
    let dir = Workdir::new();
    let (shown, report) = bench(&dir, TINY);
    let ops = [
        "attention",
        "attention + projections",
        "disentangled: plain",
        "disentangled: plain + projections",
        "disentangled",
        "disentangled + projections",
        "linear",
        "quantized: plain",
        "quantized int8",
        "quantized nf4",
        "norm",
        "activation gelu",
        "activation geglu",
        "embedding",
        "lstm",
        "gru",
    ];
    let mut expected: BTreeSet<String> =
        ops.iter().flat_map(|op| [format!("{op} fwd"), format!("{op} fwd+bwd")]).collect();
    expected.extend(["adamw step".into(), "adamw norm".into()]);
    let found: BTreeSet<String> = names(&report).into_iter().map(str::to_owned).collect();
    assert_eq!(found, expected);
    // Six names of attention in two lengths, three linears, as many frozen ones at full width and in int8, one in
    // NF4, whose blocks need 64 inputs, two recurrences in two lengths: each forward and both.
    assert_eq!(names(&report).len(), 2 * (6 * 2 + 3 + 7 + 1 + 2 + 1 + 2 * 2) + 2);
    let (copy, gemm) = (
        number(&report["ceilings"], "bytes_per_second"),
        number(&report["ceilings"], "flops_per_second"),
    );
    assert!(copy > 1e8 && gemm > 1e8, "{copy} {gemm}");
    for case in report["cases"].as_array().expect("cases") {
        let name = case["name"].as_str().expect("a name");
        assert!(shown.contains(&format!(" {name} ")), "{name} is not in\n{shown}");
        assert_eq!(case["runs"], 5, "{case}");
        let spread = &case["kernel_ms"];
        let quantiles = ["min", "p20", "median", "p80"].map(|key| number(spread, key));
        assert!(quantiles[0] > 0.0 && quantiles.is_sorted(), "{case}");
        assert_eq!(spread, &case["wall_ms"], "a CPU has one clock: {case}");
        let (bytes, flops) = (number(case, "bytes"), number(case, "flops"));
        let limit = (bytes / copy).max(flops / gemm) * 1e3;
        let share = number(case, "share_of_limit") * quantiles[2] / limit;
        assert!((share - 1.0).abs() < 1e-9, "{case}");
        let behind = ["disentangled ", "quantized "].iter().any(|op| name.starts_with(op));
        assert_eq!(case.get("times_plain").is_some(), behind, "{case}");
    }
    let run = "format version date machine settings ceilings cases";
    assert_eq!(keys(&report), run.split(' ').collect());
    assert_eq!(report["machine"]["threads"], 1);
    assert_eq!(report["settings"]["dtype"], "f32");
    assert!(number(&report["settings"], "flushed_bytes") > 0.0);
}

#[test]
fn bench_compares_with_an_older_run() {
    let dir = Workdir::new();
    let args = format!("linear norm {TINY} --filter fwd+bwd --dropout 0.1 --warm");
    let (_, mut old) = bench(&dir, &args);
    assert_eq!(names(&old).len(), 3 + 1);
    assert_eq!(old["settings"]["flushed_bytes"], 0);
    // An older run a thousand times slower and one a thousand times faster.
    for (factor, verdict) in [(1e3, "faster"), (1e-6, "slower")] {
        for case in old["cases"].as_array_mut().expect("cases") {
            for key in ["min", "p20", "median", "p80"] {
                case["kernel_ms"][key] = (number(&case["kernel_ms"], key) * factor).into();
            }
        }
        dir.write("old.json", old.to_string());
        let shown = dir.allreel(&format!("bench {args} --compare old.json")).ok().out;
        assert_eq!(shown.matches(verdict).count(), 4, "{shown}");
        assert!(!shown.contains("not like for like"), "{shown}");
        let shown = dir.allreel(&format!("bench norm {TINY} --compare old.json")).ok().out;
        let gone =
            "only in the older run: 3 case(s), the first linear fwd+bwd, 32 tokens, 16 to 16\n";
        assert!(shown.contains(gone), "{shown}");
        assert!(shown.contains("not like for like: dropout: 0.1 then, 0 now"), "{shown}");
    }
}

#[test]
fn bench_step_prints_a_line_or_an_object() {
    let dir = Workdir::new();
    let args = "bench step --kind deberta-v2 --hidden-size 16 --layers 1 --heads 2 --vocab-size 50 \
                --intermediate-size 32 --batch 2 --length 8 --repeats 3 --threads 1";
    let line = dir.allreel(args).ok().out;
    assert!(line.starts_with("deberta-v2 step of 2 x 8 tokens, 1 threads"), "{line}");
    let object = dir.allreel(&format!("{args} --json")).ok().out;
    let object: Value = serde_json::from_str(&object).expect("JSON");
    let quantiles = ["ms_min", "ms_p20", "ms_median", "ms_p80"].map(|key| number(&object, key));
    assert!(quantiles[0] > 0.0 && quantiles.is_sorted(), "{object}");
    assert!(number(&object, "gflop") > 0.0 && number(&object, "gflops_median") > 0.0, "{object}");
}

#[test]
#[cfg(feature = "mpi")]
fn mpi_bench_allreduce_times_both_sums() {
    if !crate::run::mpirun() {
        return;
    }
    let dir = Workdir::new();
    let args = "launch -n 2 -- bench allreduce --megabytes 1 --repeats 3";
    let shown = dir.allreel(args).ok().out;
    for name in ["bucketed, in place", "bare MPI_Allreduce"] {
        assert_eq!(shown.matches(name).count(), 1, "{shown}");
    }
    assert_eq!(shown.matches("1 MB over 2 ranks: median").count(), 2, "{shown}");
}
