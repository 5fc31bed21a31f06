//! `terem cpu`: models, what a guest sees, baselines and comparisons.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Exit code, standard output and standard error of `terem cpu …`.
fn cpu(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_terem")).arg("cpu").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn said(arguments: &[&str]) -> String {
    let (code, out, err) = cpu(arguments);
    assert_eq!(code, 0, "{arguments:?}: {err}");
    out
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&said(&[arguments, &["--json"]].concat())).unwrap()
}

fn names(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

/// A host's file: this host's, with another vendor and without some of what its accelerators can give.
fn host_file(path: &Path, vendor: &str, without: &[&str]) {
    let mut host = json(&["host"]);
    host["vendor"] = vendor.into();
    let soft = names(&host["accelerators"]["soft"]).into_iter().filter(|f| !without.contains(f));
    host["accelerators"]["soft"] = soft.collect::<Vec<_>>().into();
    std::fs::write(path, host.to_string()).unwrap();
}

#[test]
fn models_are_listed_with_what_this_host_lacks() {
    let table = said(&["models"]);
    for name in ["terem64 ", "x86-64-v3 ", "EPYC-Milan-v2 ", "Dhyana-v1 ", "Skylake-Server-v3 ", "host "] {
        assert!(table.lines().any(|l| l.starts_with(name)), "no {name} in\n{table}");
    }
    let all = json(&["models"]);
    let model = |name: &str| all.as_array().unwrap().iter().find(|m| m["name"] == name).unwrap();
    assert_eq!(model("terem64")["leaves_out"], true);
    assert!(names(&model("Skylake-Server-v1")["missing"]["soft"]).contains(&"avx512f"));
    assert_eq!(model("Skylake-Server-v1")["aliases"][0], "Skylake-Server");
}

#[test]
fn what_a_guest_sees_is_shown() {
    let text = said(&["show", "EPYC-Rome,-avx2", "--cpus", "4,dies=2,l3=64M", "--leaves"]);
    for part in [
        "vendor       AuthenticAMD",
        "family 23 model 49",
        "L3 64 MiB, 16 ways, one for each die",
        "this host lacks",
        "8000001e",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    assert!(!text.contains(" avx2 "), "{text}");
    let shown = json(&["show", "max"]);
    assert!(
        names(&shown["left_out"]).contains(&"avx512f") && !names(&shown["features"]).contains(&"avx512f")
    );
    let (code, _, err) = cpu(&["show", "EPYC-Rom,+warp"]);
    assert_eq!(code, 2);
    assert!(
        err.contains("there is no CPU model \"EPYC-Rom\"") && err.contains("no CPU feature \"warp\""),
        "{err}"
    );
    let (code, _, err) = cpu(&["show", "max", "--cpus", "4,cores=3"]);
    assert!(code == 2 && err.contains("do not make 4 vCPUs"), "{err}");
}

#[test]
fn hosts_have_a_baseline() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    host_file(Path::new(&file("a.json")), "GenuineIntel", &["avx2", "fma"]);
    host_file(Path::new(&file("b.json")), "GenuineIntel", &["aes"]);
    host_file(Path::new(&file("c.json")), "AuthenticAMD", &["x2apic"]);
    let of = |files: &[&str]| {
        let files: Vec<String> = files.iter().map(|f| file(f)).collect();
        let words: Vec<&str> = files.iter().map(String::as_str).chain(["--accel", "soft"]).collect();
        json(&[&["baseline"], &words[..]].concat())
    };
    let both = of(&["a.json", "b.json"]);
    let features = names(&both["features"]);
    assert!(
        features.contains(&"sse2") && !features.contains(&"aes") && !features.contains(&"avx2"),
        "{both}"
    );
    let name = both["model"].as_str().unwrap();
    assert!(!name.starts_with("EPYC") && !name.starts_with("terem64"), "{name}");
    assert!(of(&["a.json", "c.json"])["model"].as_str().unwrap().starts_with("x86-64-v"));
    // What it says can be given to --cpu.
    let words = said(&["baseline", &file("a.json"), &file("b.json"), "--accel", "soft"]);
    assert!(said(&["show", words.trim()]).contains("soft         this host can run it"));
    let (code, _, err) = cpu(&["baseline", &file("none.json")]);
    assert!(code == 2 && err.contains("cannot read"), "{err}");
    std::fs::write(file("odd.json"), "{\"cpu\": 1}").unwrap();
    let (code, _, err) = cpu(&["baseline", &file("odd.json")]);
    assert!(code == 2 && err.contains("terem cpu host --json"), "{err}");
}

#[test]
fn models_and_hosts_are_compared() {
    let text = said(&["compare", "Haswell-v1", "Haswell-v2"]);
    assert!(text.contains("only in Haswell-v1:\n             hle rtm\n"), "{text}");
    assert!(text.contains("only in Haswell-v2: nothing"), "{text}");
    let d = json(&["compare", "EPYC", "Dhyana"]);
    assert_eq!(d["properties"][0][0], "vendor");
    assert!(said(&["compare", "EPYC-v1", "EPYC"]).contains("the same"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("h.json").display().to_string();
    host_file(Path::new(&file), "GenuineIntel", &[]);
    assert!(said(&["compare", "x86-64-v1", &file]).contains("only in"));
}
