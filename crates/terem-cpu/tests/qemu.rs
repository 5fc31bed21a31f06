//! Every CPU model of the catalogue against QEMU's model of the same name: its features, by what QEMU says of it, and all
//! leaves of CPUID, by what a guest reads (`qemu/dump.asm`, a firmware, under QEMU's TCG).
//!
//! Where both differ, `qemu/differences` says so, and why.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use terem_cpu::{CpuModel, Cpuid, FeatureSet, Topology, features, models};

/// QEMU's models are compared as KVM's guests get them, whose defaults these are.
const DEFAULTS_OF_KVM: &str = "svm=off,monitor=off,x2apic=on";
/// What QEMU takes for the width of physical addresses without KVM.
const PHYS_BITS: u8 = 40;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qemu")
}

/// A QEMU that answers questions.
struct Qmp {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Qmp {
    fn start() -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-S",
            "-display",
            "none",
            "-nodefaults",
            "-qmp",
            "stdio",
        ]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut qmp = Self { child, to, from };
        qmp.line();
        qmp.ask("qmp_capabilities", &json!({}));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        writeln!(self.to, "{}", json!({ "execute": command, "arguments": arguments })).unwrap();
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    /// The properties of a model.
    fn expand(&mut self, name: &str) -> Value {
        let props = json!({ "svm": false, "monitor": false, "x2apic": true });
        let model = json!({ "name": name, "props": props });
        let mut answer = self.ask("query-cpu-model-expansion", &json!({ "type": "full", "model": model }));
        answer["model"]["props"].take()
    }

    /// What TCG cannot give, by model.
    fn unavailable(&mut self) -> BTreeMap<String, Vec<String>> {
        let all = self.ask("query-cpu-definitions", &json!({}));
        let texts =
            |v: &Value| v.as_array().unwrap().iter().map(|f| f.as_str().unwrap().to_owned()).collect();
        let one = |d: &Value| (d["name"].as_str().unwrap().to_owned(), texts(&d["unavailable-features"]));
        all.as_array().unwrap().iter().map(one).collect()
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The models that QEMU has, too.
fn processors() -> Vec<CpuModel> {
    let own = |m: &CpuModel| m.brand.starts_with("Teremok");
    models().into_iter().filter(|m| !own(m)).collect()
}

#[test]
fn models_have_the_features_that_qemu_says() {
    let mut qmp = Qmp::start();
    let mut compared = 0;
    for model in processors() {
        let theirs = qmp.expand(&model.name);
        for name in model.aliases.iter().chain([&model.name]) {
            assert_eq!(qmp.expand(name)["model-id"], theirs["model-id"], "{name}");
        }
        let s = model.signature;
        let [basic, extended] = [model.levels.0, model.levels.1];
        let seven = Cpuid::new(model.clone(), Topology::flat(1), 0, 0, PHYS_BITS).query(7, 0).registers[0];
        for (key, ours) in [
            ("vendor", json!(model.vendor.to_string())),
            ("model-id", json!(model.brand)),
            ("family", json!(s.family)),
            ("model", json!(s.model)),
            ("stepping", json!(s.stepping)),
            ("level", json!(basic)),
            ("xlevel", json!(extended)),
            ("avx10-version", json!(model.avx10)),
            ("level-func7", json!(if basic < 7 { 0 } else { seven })),
        ] {
            assert_eq!(theirs[key], ours, "{}: {key}", model.name);
        }
        for f in features() {
            // QEMU has no switch for what it does not know, and switches `vme` off for TCG before it looks at a model.
            let Some(on) = theirs[f.name].as_bool().filter(|_| f.name != "vme") else { continue };
            assert_eq!(model.features.contains(f), on, "{}: {}", model.name, f.name);
            compared += 1;
        }
    }
    assert!(compared > 15_000, "{compared}");
}

/// One line of `differences`: leaf, subleaf (or `*`), register, mask, vendors (or `*`), reason.
struct Excuse {
    leaf: u32,
    subleaf: Option<u32>,
    register: usize,
    mask: u32,
    vendor: Option<String>,
    line: String,
}

fn excuses() -> Vec<Excuse> {
    let text = std::fs::read_to_string(folder().join("differences")).unwrap();
    let hex = |word: &str| u32::from_str_radix(word, 16).unwrap_or_else(|e| panic!("{word}: {e}"));
    let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let register = ["eax", "ebx", "ecx", "edx"].iter().position(|r| *r == words[2]);
            Excuse {
                leaf: hex(words[0]),
                subleaf: (words[1] != "*").then(|| hex(words[1])),
                register: register.unwrap_or_else(|| panic!("{line}")),
                mask: hex(words[3]),
                vendor: (words[4] != "*").then(|| words[4].into()),
                line: line.into(),
            }
        })
        .collect()
}

/// What a guest of QEMU's reads, by leaf and subleaf.
fn dump(work: &Path, firmware: &Path, model: &str, topology: &Topology) -> BTreeMap<(u32, u32), [u32; 4]> {
    let out = work.join(format!("{model}-{}", topology.dies));
    let t = topology;
    let smp =
        format!("{},sockets={},dies={},cores={},threads={}", t.cpus(), t.sockets, t.dies, t.cores, t.threads);
    let mut command = Command::new("timeout");
    command.args(["60", "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-smp", &smp, "-m", "16"]);
    command.args(["-cpu", &format!("{model},{DEFAULTS_OF_KVM}"), "-display", "none", "-nodefaults"]);
    command.args(["-device", "isa-debug-exit,iobase=0x501", "-bios"]).arg(firmware);
    command.arg("-debugcon").arg(format!("file:{}", out.display()));
    let ended = command.stdin(Stdio::null()).output().unwrap();
    // isa-debug-exit: twice what was written, and 1.
    assert_eq!(ended.status.code(), Some(1), "{model}: {}", String::from_utf8_lossy(&ended.stderr));
    let bytes = std::fs::read(&out).unwrap();
    let record = |r: &[u8]| {
        let word = |i: usize| u32::from_le_bytes(r[4 * i..4 * i + 4].try_into().unwrap());
        ((word(0), word(1)), [2, 3, 4, 5].map(word))
    };
    bytes.chunks_exact(24).map(record).collect()
}

#[test]
fn guests_read_the_leaves_that_qemus_guests_read() {
    let work = tempfile::tempdir().unwrap();
    let firmware = work.path().join("dump.bin");
    let mut nasm = Command::new("nasm");
    nasm.current_dir(folder()).args(["-f", "bin", "-o"]).arg(&firmware).arg("dump.asm");
    assert!(nasm.status().unwrap().success());
    let unavailable = Qmp::start().unavailable();
    let excuses = excuses();
    let mut used = BTreeSet::new();
    let mut wrong = Vec::new();
    let (mut leaves, mut models) = (0, 0);
    let usual = Topology { sockets: 2, dies: 1, cores: 2, threads: 2 };
    let of_dies = Topology { sockets: 1, dies: 2, cores: 2, threads: 2 };
    let with_dies = ["SapphireRapids-v3", "EPYC-Milan-v2", "Dhyana-v2"];
    let mut tasks: Vec<(CpuModel, Topology)> = processors().into_iter().map(|m| (m, usual)).collect();
    tasks.extend(with_dies.map(|name| (CpuModel::find(name, &[]).unwrap(), of_dies)));
    for (mut model, topology) in tasks {
        let name = model.name.clone();
        let theirs = dump(work.path(), &firmware, &name, &topology);
        // TCG gives less than the model: so does ours, then. But leaves end where they ended with all of it, and AMD's leaves
        // of topology and caches are there, whatever TCG says of them.
        let lacking =
            unavailable[&name].iter().map(String::as_str).chain(["vme"]).filter(|f| *f != "topoext");
        let lacking = FeatureSet::of(&lacking.collect::<Vec<_>>());
        let whole = Cpuid::new(model.clone(), topology, 0, 0, PHYS_BITS);
        model.levels = [0, 0x8000_0000].map(|leaf| whole.query(leaf, 0).registers[0]).into();
        model.features = model.features.without(&lacking);
        let vendor = model.vendor.to_string();
        let ours = Cpuid::new(model, topology, 0, 0, PHYS_BITS);
        models += 1;
        for ((leaf, subleaf), theirs) in theirs {
            let ours = ours.query(leaf, subleaf).registers;
            leaves += 1;
            for register in 0..4 {
                let mut differ = ours[register] ^ theirs[register];
                for (i, e) in excuses.iter().enumerate() {
                    let here = e.leaf == leaf
                        && e.subleaf.is_none_or(|s| s == subleaf)
                        && e.register == register
                        && e.vendor.as_ref().is_none_or(|v| *v == vendor);
                    if here && differ & e.mask != 0 {
                        used.insert(i);
                        differ &= !e.mask;
                    }
                }
                if differ != 0 {
                    let (o, t) = (ours[register], theirs[register]);
                    wrong.push(format!(
                        "{name} {leaf:x} {subleaf:x} {} ours {o:08x} QEMU's {t:08x}",
                        ["eax", "ebx", "ecx", "edx"][register]
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
    let unused: Vec<_> = (0..excuses.len()).filter(|i| !used.contains(i)).map(|i| &excuses[i].line).collect();
    assert!(unused.is_empty(), "these lines of `differences` are about nothing: {unused:#?}");
    println!("{models} models, {leaves} leaves and subleaves");
}
