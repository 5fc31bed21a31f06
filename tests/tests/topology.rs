//! What a Debian guest makes of its CPU model, topology and caches: `lscpu`, and the kernel's own view in sysfs, on a processor
//! of Intel's and one of AMD's, by an older and a newer kernel (which read the topology in different ways).

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::collections::BTreeMap;

use terem_tests::{Guest, alone, cached};

/// What the guest is asked for, a shell line; each ends with the prompt's word.
const QUESTIONS: &str = "lscpu | cat; cd /sys/devices/system/cpu; for c in cpu[0-9]*; do \
    for f in $c/topology/physical_package_id $c/topology/die_cpus_list $c/topology/core_cpus_list $c/topology/package_cpus_list \
    $c/cache/index*/level $c/cache/index*/type $c/cache/index*/size $c/cache/index*/ways_of_associativity \
    $c/cache/index*/shared_cpu_list; do echo SYS $f $(cat $f); done; done; \
    for f in /sys/devices/system/node/node*/cpulist /sys/devices/system/node/node*/distance; do echo SYS $f $(cat $f); done; echo END-$((40+2))\n";

/// What a guest says of itself.
struct Seen {
    /// `lscpu`, by the name of the line.
    lscpu: BTreeMap<String, String>,
    /// Files below `/sys/devices/system/cpu`.
    sys: BTreeMap<String, String>,
}

impl Seen {
    fn ask(kernel: &str, cpu: &str, cpus: &str, more: &[&str]) -> Self {
        let _one = alone();
        let arguments = [
            "--cpu",
            cpu,
            "--cpus",
            cpus,
            "--memory",
            "512M",
            "--net",
            "none",
            "--accel",
            "soft",
            "--kernel",
            &cached(&format!("kernel-{kernel}/vmlinuz")).display().to_string(),
            "--initrd",
            &cached(&format!("debian/initramfs-{kernel}")).display().to_string(),
            "--cmdline",
            "console=ttyS0 quiet root=/dev/vda init=/bin/sh",
            "--disk",
            &format!("{},readonly", cached("debian/debian.qcow2").display()),
        ];
        let mut guest = Guest::start(arguments.into_iter().chain(more.iter().copied()));
        let shell = guest.wait_after(0, "# ");
        guest.type_in("stty -echo; export TERM=dumb LC_ALL=C; mount -t proc proc /proc; mount -t sysfs sys /sys; echo READY-$((1+1))\n");
        let ready = guest.wait_after(shell, "READY-2");
        guest.type_in(QUESTIONS);
        let end = guest.wait_after(ready, "END-42");
        let said = guest.wait_for("END-42");
        guest.kill();
        let mut seen = Self { lscpu: BTreeMap::new(), sys: BTreeMap::new() };
        for line in said[ready..end].lines() {
            if let Some((file, value)) = line.strip_prefix("SYS ").and_then(|rest| rest.split_once(' ')) {
                seen.sys.insert(file.into(), value.trim().into());
            } else if let Some((name, value)) = line.split_once(':') {
                seen.lscpu.insert(name.trim().into(), value.trim().into());
            }
        }
        seen
    }

    fn assert_lscpu(&self, expected: &[(&str, &str)]) {
        for (name, value) in expected {
            let found = self.lscpu.get(*name).map(String::as_str);
            assert_eq!(found, Some(*value), "{name} in {:#?}", self.lscpu);
        }
    }

    fn sys(&self, file: &str) -> &str {
        self.sys.get(file).unwrap_or_else(|| panic!("the guest has no {file}: {:#?}", self.sys))
    }

    /// Level, type, size, ways and sharers of each cache of a processor.
    fn caches(&self, cpu: u32) -> Vec<[&str; 5]> {
        let parts = ["level", "type", "size", "ways_of_associativity", "shared_cpu_list"];
        let there = |i: &u32| self.sys.contains_key(&format!("cpu{cpu}/cache/index{i}/level"));
        (0..8)
            .filter(there)
            .map(|i| parts.map(|p| self.sys(&format!("cpu{cpu}/cache/index{i}/{p}"))))
            .collect()
    }
}

#[test]
fn an_intel_of_two_sockets() {
    let seen = Seen::ask("6.1", "SandyBridge", "8,sockets=2,cores=2,threads=2,l2=1M,l3=24M", &[]);
    seen.assert_lscpu(&[
        ("Vendor ID", "GenuineIntel"),
        ("Model name", "Intel Xeon E312xx (Sandy Bridge)"),
        ("CPU family", "6"),
        ("Model", "42"),
        ("Stepping", "1"),
        ("CPU(s)", "8"),
        ("Thread(s) per core", "2"),
        ("Core(s) per socket", "2"),
        ("Socket(s)", "2"),
        ("L1d cache", "128 KiB (4 instances)"),
        ("L1i cache", "128 KiB (4 instances)"),
        ("L2 cache", "4 MiB (4 instances)"),
        ("L3 cache", "48 MiB (2 instances)"),
    ]);
    assert_eq!(
        (seen.sys("cpu5/topology/physical_package_id"), seen.sys("cpu5/topology/core_cpus_list")),
        ("1", "4-5")
    );
    assert_eq!(seen.sys("cpu0/topology/package_cpus_list"), "0-3");
    assert_eq!(
        seen.caches(6),
        [
            ["1", "Data", "32K", "8", "6-7"],
            ["1", "Instruction", "32K", "8", "6-7"],
            ["2", "Unified", "1024K", "16", "6-7"],
            ["3", "Unified", "24576K", "16", "4-7"],
        ]
    );
}

#[test]
fn an_amd_of_two_dies_which_are_numa_nodes() {
    let nodes = ["--numa", "0-3,memory=256M", "--numa", "4-7,memory=256M,distance=0:21"];
    let seen = Seen::ask("6.12", "EPYC-Rome,enforce=off", "8,dies=2,cores=2,threads=2,l2=1M", &nodes);
    seen.assert_lscpu(&[
        ("Vendor ID", "AuthenticAMD"),
        ("Model name", "AMD EPYC-Rome Processor"),
        ("CPU family", "23"),
        ("Model", "49"),
        ("CPU(s)", "8"),
        ("Thread(s) per core", "2"),
        ("Core(s) per socket", "4"),
        ("Socket(s)", "1"),
        ("L1d cache", "128 KiB (4 instances)"),
        ("L2 cache", "4 MiB (4 instances)"),
        ("L3 cache", "32 MiB (2 instances)"),
        ("NUMA node(s)", "2"),
        ("NUMA node1 CPU(s)", "4-7"),
    ]);
    let node = "/sys/devices/system/node/node";
    assert_eq!(seen.sys(&format!("{node}0/cpulist")), "0-3");
    assert_eq!([0, 1].map(|n| seen.sys(&format!("{node}{n}/distance"))), ["10 21", "21 10"]);
    assert_eq!(seen.sys("cpu3/topology/die_cpus_list"), "0-3");
    assert_eq!(seen.sys("cpu3/topology/core_cpus_list"), "2-3");
    assert_eq!(seen.sys("cpu3/topology/package_cpus_list"), "0-7");
    assert_eq!(
        seen.caches(6),
        [
            ["1", "Data", "32K", "8", "6-7"],
            ["1", "Instruction", "32K", "8", "6-7"],
            ["2", "Unified", "1024K", "8", "6-7"],
            ["3", "Unified", "16384K", "16", "4-7"],
        ]
    );
}

#[test]
fn an_intel_of_two_dies() {
    let seen = Seen::ask("6.12", "Nehalem", "4,dies=2,cores=2,l3_sharing=socket", &[]);
    seen.assert_lscpu(&[
        ("CPU(s)", "4"),
        ("Core(s) per socket", "4"),
        ("Socket(s)", "1"),
        ("L2 cache", "16 MiB (4 instances)"),
        ("L3 cache", "16 MiB (1 instance)"),
    ]);
    assert_eq!(
        (seen.sys("cpu3/topology/die_cpus_list"), seen.sys("cpu3/topology/core_cpus_list")),
        ("2-3", "3")
    );
    assert_eq!(seen.caches(3)[3], ["3", "Unified", "16384K", "16", "0-3"]);
}
