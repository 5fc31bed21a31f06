//! What `terem cpu` prints for people.

use std::fmt::Write;

use terem_cpu::{Baseline, Cache, CpuModel, Level};
use terem_machine::HostCpus;

use super::arguments::Accelerator;
use super::{Difference, Listed, Shown};

/// Columns of a line of words.
const WIDTH: usize = 100;

/// A name and its text.
fn line(name: &str, text: &str) -> String {
    format!("{name:<12} {text}\n")
}

/// A name and words, over several lines.
fn words(name: &str, words: &[&str]) -> String {
    let mut lines = vec![String::new()];
    for word in words {
        let full = lines.last().is_some_and(|l| !l.is_empty() && l.len() + word.len() + 1 > WIDTH);
        if full {
            lines.push(String::new());
        }
        if let Some(last) = lines.last_mut() {
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(word);
        }
    }
    (0..).zip(&lines).map(|(i, text)| line(if i == 0 { name } else { "" }, text)).collect()
}

fn size(kib: u32) -> String {
    if kib >= 1024 && kib.is_multiple_of(1024) { format!("{} MiB", kib / 1024) } else { format!("{kib} KiB") }
}

fn cache(name: &str, cache: &Cache) -> String {
    let sharing = match cache.sharing {
        Level::Core => "core",
        Level::Die => "die",
        Level::Socket => "socket",
    };
    format!("{name} {}, {} ways, one for each {sharing}", size(cache.kib), cache.ways)
}

/// What there is to say of a model besides its features.
pub fn facts(m: &CpuModel) -> Vec<(&'static str, String)> {
    let s = m.signature;
    let l3 = m.caches.l3.map_or_else(|| "L3 none".into(), |l3| cache("L3", &l3));
    vec![
        ("vendor", m.vendor.to_string()),
        ("signature", format!("family {} model {} stepping {}", s.family, s.model, s.stepping)),
        ("brand", m.brand.clone()),
        ("caches", cache("L1d", &m.caches.l1d)),
        ("", cache("L1i", &m.caches.l1i)),
        ("", cache("L2", &m.caches.l2)),
        ("", l3),
    ]
}

/// `yes`, or how much it lacks.
fn runs(missing: Option<&Vec<&'static str>>, leaves_out: bool) -> String {
    match missing {
        None => "–".into(),
        Some(missing) if missing.is_empty() => "yes".into(),
        Some(_) if leaves_out => "yes, in part".into(),
        Some(missing) => format!("lacks {}", missing.len()),
    }
}

/// The table of `terem cpu models`.
pub fn models(listed: &[Listed]) -> String {
    let mut text =
        format!("{:<24}{:<14}{:<14}{:<14}{}\n", "MODEL", "VENDOR", "SOFT", "KVM", "OTHER NAMES, BRAND");
    for Listed { model, leaves_out, missing } in listed {
        let soft = runs(Some(&missing.soft), *leaves_out);
        let kvm = runs(missing.kvm.as_ref(), *leaves_out);
        let names: String = model.aliases.iter().map(|a| format!("{a}: ")).collect();
        let _ = writeln!(
            text,
            "{:<24}{:<14}{soft:<14}{kvm:<14}{names}{}",
            model.name,
            model.vendor.to_string(),
            model.brand
        );
    }
    text.push_str("\n`terem cpu show MODEL` says what a host lacks.\n");
    text
}

/// What `terem cpu show` prints.
pub fn shown(shown: &Shown) -> String {
    let m = &shown.model;
    let mut text = line("model", &m.name);
    if !m.aliases.is_empty() {
        text += &line("also", &m.aliases.join(", "));
    }
    for (name, fact) in facts(m) {
        text += &line(name, &fact);
    }
    text += &words("features", &m.features.names());
    let left_out: Vec<&str> = shown.left_out.iter().map(String::as_str).collect();
    if !left_out.is_empty() {
        text += &words("left out", &left_out);
        text += &line("", "(this model does without what the software CPU cannot give here)");
    }
    let of = |name: &str, missing: &[&'static str]| {
        let missing: Vec<&str> = missing.iter().copied().filter(|f| !left_out.contains(f)).collect();
        if missing.is_empty() {
            line(name, "this host can run it")
        } else {
            words(name, &[&["this host lacks"], &missing[..]].concat())
        }
    };
    text += &of("soft", &shown.missing.soft);
    text += &shown.missing.kvm.as_ref().map_or_else(|| line("kvm", "this host has none"), |m| of("kvm", m));
    if let Some(leaves) = &shown.leaves {
        text += "\n    leaf subleaf       eax       ebx       ecx       edx\n";
        for l in leaves {
            let [a, b, c, d] = l.registers;
            let _ = writeln!(text, "{:8x} {:7x}  {a:08x}  {b:08x}  {c:08x}  {d:08x}", l.leaf, l.subleaf);
        }
    }
    text
}

/// What `terem cpu host` prints.
pub fn host(here: &HostCpus) -> String {
    let mut text = String::new();
    for (name, fact) in facts(&super::as_model(&here.cpu)) {
        text += &line(name, &fact);
    }
    text += &line("addresses", &format!("{} bits", here.cpu.phys_bits));
    text += &words("features", &here.cpu.features.names());
    text += &words("soft", &here.accelerators.soft.names());
    text += &here.accelerators.kvm.map_or_else(|| line("kvm", "none"), |kvm| words("kvm", &kvm.names()));
    text
}

/// What `terem cpu baseline` prints: the value for `--cpu`, which is all that a script wants.
pub fn baseline(found: &Baseline, accel: Accelerator) -> String {
    let accel = match accel {
        Accelerator::Kvm => "KVM",
        Accelerator::Soft => "the software CPU",
    };
    let flags: String = found.flags.iter().map(|f| format!(",{f}")).collect();
    eprintln!("terem: with {accel} all of these hosts can run this one (--cpu):");
    format!("{}{flags}\n", found.model)
}

/// What `terem cpu compare` prints.
pub fn difference(one: &str, other: &str, d: &Difference) -> String {
    let mut text = String::new();
    for (name, a, b) in &d.properties {
        text += &line(name, &format!("{a} → {b}"));
    }
    if d.only_one.is_empty() && d.only_other.is_empty() {
        text += "features     the same\n";
        return text;
    }
    for (name, only) in [(one, &d.only_one), (other, &d.only_other)] {
        if only.is_empty() {
            text += &format!("only in {name}: nothing\n");
        } else {
            text += &format!("only in {name}:\n{}", words("", only));
        }
    }
    text
}
