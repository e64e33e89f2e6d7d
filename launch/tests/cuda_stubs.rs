//! `launch/cuda-stubs`: a program linked with them, without CUDA's libraries and with false ones.

use std::path::Path;
use std::process::Command;

/// Calls functions of three libraries; the arguments fill registers of both kinds and the stack.
const CALLER: &str = r#"
#include <stdio.h>
int cuInit(unsigned);
const char *ncclGetErrorString(int);
int curandGenerateNormal(void *, float *, unsigned long, float, float);
int cublasGemmEx(long, int, int, int, int, int, void *, void *, int, int, void *, int, int, void *,
                 void *, int, int, int, int);
int main(void) {
    printf("cuInit %d\n", cuInit(0));
    printf("text %s\n", ncclGetErrorString(3));
    for (int twice = 0; twice < 2; ++twice) {
        printf("normal %d\n", curandGenerateNormal(0, 0, 5, 2.5f, -3.5f));
        printf("gemm %d\n", cublasGemmEx(1, 2, 3, 4, 5, 6, 0, 0, 7, 8, 0, 9, 10, 0, 0, 11, 12, 13, 14));
    }
}
"#;

/// Both libraries in one: what they are given makes up what they return.
const LIBRARY: &str = r"
int curandGenerateNormal(void *g, float *x, unsigned long n, float mean, float deviation) {
    return n == 5 && mean == 2.5f && deviation == -3.5f ? 7 : -1;
}
int cublasGemmEx(long a, int b, int c, int d, int e, int f, void *g, void *h, int i, int j, void *k,
                 int l, int m, void *n, void *o, int p, int q, int r, int s) {
    return a + b + c + d + e + f + i + j + l + m + p + q + r + s;
}
";

/// Standard output of a program that must succeed.
#[track_caller]
fn run(program: &str, folder: &Path, arguments: &[&str], libraries: &str) -> String {
    let mut command = Command::new(program);
    command.current_dir(folder).args(arguments).env("LD_LIBRARY_PATH", libraries);
    let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn a_program_with_cuda_starts_without_it_and_finds_it_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let stubs = folder.to_str().unwrap();
    run("launch/cuda-stubs", repository, &[stubs, "13"], "");
    std::fs::write(folder.join("caller.c"), CALLER).unwrap();
    std::fs::write(folder.join("library.c"), LIBRARY).unwrap();
    let libraries = ["-lcuda", "-lnccl", "-lcurand", "-lcublas"];
    let arguments = [&["caller.c", "-o", "caller", "-L."], &libraries[..]].concat();
    run("cc", folder, &arguments, "");
    run("cc", folder, &["-shared", "-fPIC", "library.c", "-o", "libcurand.so.10"], "");
    std::fs::copy(folder.join("libcurand.so.10"), folder.join("libcublas.so.13")).unwrap();

    let caller = folder.join("caller");
    let caller = caller.to_str().unwrap();
    let found = run(caller, folder, &[], stubs);
    let twice = "normal 7\ngemm 105\n".repeat(2);
    assert!(found.ends_with(&twice), "{found}");
    // A machine with CUDA answers for itself.
    if !["/usr/local/cuda/lib64", "/dev/nvidiactl"].iter().any(|path| Path::new(path).exists()) {
        let missing = run(caller, folder, &[], "");
        let text = "text libnccl.so.2, or a function of it, is not on this machine\n";
        let twice = "normal 100\ngemm 1\n".repeat(2);
        assert_eq!(missing, format!("cuInit 100\n{text}{twice}"));
    }
}
