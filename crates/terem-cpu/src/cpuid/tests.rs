use super::*;
use proptest::prelude::*;

fn model(name: &str) -> CpuModel {
    CpuModel::find(name, &[]).unwrap()
}

fn cpuid(name: &str, topology: Topology, index: u32) -> Cpuid {
    Cpuid::new(model(name), topology, index, 2_000_000, 40)
}

fn layout(sockets: u32, dies: u32, cores: u32, threads: u32) -> Topology {
    Topology { sockets, dies, cores, threads }
}

#[test]
fn identification_is_packed_as_the_manuals_say() {
    let c = cpuid("terem64", Topology::flat(1), 0);
    let [max, b, d2, d1] = c.query(0, 0).registers;
    assert_eq!(max, 0x16);
    let text: Vec<u8> = [b, d1, d2].iter().flat_map(|r| r.to_le_bytes()).collect();
    assert_eq!(text, b"AuthenticAMD");
    let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .flat_map(|l| c.query(l, 0).registers)
        .flat_map(u32::to_le_bytes)
        .take_while(|&b| b != 0)
        .collect();
    assert_eq!(brand, b"Teremok virtual CPU");
    assert_eq!(c.query(0x8000_0001, 77), c.query(0x8000_0001, 0), "ECX says nothing there");
    assert_ne!(c.query(7, 1), c.query(7, 0));
}

#[test]
fn beyond_the_last_leaf_vendors_differ() {
    let amd = cpuid("EPYC", Topology::flat(1), 0);
    let intel = cpuid("Skylake-Server", Topology::flat(1), 0);
    for leaf in [0x0e, 0x1234_5678, 0x4000_0001, 0x8000_00ff] {
        assert_eq!(amd.query(leaf, 0).registers, [0; 4]);
        assert_eq!(intel.query(leaf, 1), intel.query(0xd, 1));
    }
    assert_eq!(amd.query(0x4000_0000, 0).registers[1].to_le_bytes(), *b"Tere");
}

#[test]
fn features_raise_the_highest_leaf() {
    let c = |name: &str, flag: &str| {
        let m = CpuModel::find(name, &[flag.into()]).unwrap();
        Cpuid::new(m, Topology::flat(1), 0, 1, 40)
    };
    assert_eq!(c("Opteron_G2", "+avx2").query(0, 0).registers[0], 7);
    assert_eq!(c("Opteron_G2", "+topoext").query(0x8000_0000, 0).registers[0], 0x8000_001e);
    assert_eq!(c("Nehalem", "+mcdt-no").query(7, 0).registers[0], 2);
    let dies = Cpuid::new(model("Nehalem"), layout(1, 2, 2, 1), 0, 1, 40);
    assert_eq!(dies.query(0, 0).registers[0], 0x1f);
}

#[test]
fn topology_of_an_intel() {
    let c = cpuid("SapphireRapids", layout(2, 1, 3, 2), 7);
    assert_eq!(c.query(0xb, 0).registers, [1, 2, 0x100, 9]);
    assert_eq!(c.query(0xb, 1).registers, [3, 6, 0x201, 9]);
    assert_eq!(c.query(0xb, 2).registers, [0, 0, 2, 9]);
    assert_eq!(c.query(0x1f, 0).registers, [0; 4], "there are no dies to tell of");
    let [_, ebx, _, edx] = c.query(1, 0).registers;
    assert_eq!((ebx >> 24, ebx >> 16 & 0xff, edx >> 28 & 1), (9, 8, 1));
    // 4 core ids in a package; level 1 is of 2 ids, level 3 of 8.
    assert_eq!(c.query(4, 0).registers[0], 3 << 26 | 1 << 14 | 0x121);
    assert_eq!(c.query(4, 3).registers[0], 3 << 26 | 7 << 14 | 0x163);
    assert_eq!(c.query(4, 4).registers, [0; 4]);
    assert_eq!(c.query(0x8000_0008, 0).registers[2], 0);
    let d = cpuid("SapphireRapids", layout(1, 2, 4, 2), 15);
    assert_eq!(d.query(0x1f, 0).registers, [1, 2, 0x100, 15]);
    assert_eq!(d.query(0x1f, 1).registers, [3, 8, 0x201, 15]);
    assert_eq!(d.query(0x1f, 2).registers, [4, 16, 0x502, 15]);
    assert_eq!(d.query(0x1f, 3).registers, [0, 0, 3, 15]);
    assert_eq!(d.query(4, 3).registers[0] >> 14 & 0xfff, 7, "a die has its own level 3 cache");
}

#[test]
fn topology_of_an_amd() {
    let c = cpuid("EPYC-Milan", layout(2, 2, 3, 2), 23);
    // From the highest bit: socket 1, die 1, core 2 (two bits), thread 1.
    assert_eq!(c.apic_id(), 0b11101);
    assert_eq!(c.query(0x8000_001e, 0).registers, [29, 1 << 8 | 6, 1 << 8 | 3, 0]);
    assert_eq!(c.query(0x8000_0008, 0).registers[2], 4 << 12 | 11);
    assert_eq!(c.query(1, 0).registers[1] >> 16 & 0xff, 12);
    assert_eq!(c.query(0x8000_0001, 0).registers[2] >> 1 & 1, 1);
    assert_eq!(c.query(0x8000_001d, 3).registers[0] >> 14 & 0xfff, 7);
    assert_eq!(c.query(0x8000_001d, 4).registers, [0; 4]);
    assert_eq!((c.query(4, 0).registers, c.query(2, 0).registers), ([0; 4], [0; 4]));
    // 32 KiB of 8 ways; 512 KiB of 8 ways, 32 MiB of 16 ways.
    assert_eq!(c.query(0x8000_0005, 0).registers[2], 0x2008_0140);
    assert_eq!(c.query(0x8000_0006, 0).registers[2..], [0x0200_6140, 0x0100_8140]);
}

#[test]
fn switched_off_features_are_not_shown() {
    let m = CpuModel::find("terem64", &["-aes".into(), "-xsave".into(), "-topoext".into()]).unwrap();
    let c = Cpuid::new(m, Topology::flat(2), 0, 1, 40);
    assert_eq!(c.query(1, 0).registers[2] & (1 << 25 | 1 << 26), 0);
    assert_eq!(c.query(0xd, 0).registers, [0; 4]);
    assert_eq!(c.query(0x8000_001d, 0).registers, [0; 4]);
}

#[test]
fn xsave_leaves_tell_of_each_component() {
    let c = |name| cpuid(name, Topology::flat(1), 0);
    assert_eq!(c("terem64").query(0xd, 0).registers, [3, 576, 576, 0]);
    assert_eq!(c("terem64").query(0xd, 2).registers, [0; 4]);
    assert_eq!(c("x86-64-v3").query(0xd, 0).registers, [7, 576, 832, 0]);
    assert_eq!(c("x86-64-v3").query(0xd, 2).registers, [256, 576, 0, 0]);
    assert_eq!(c("EPYC-Milan").query(0xd, 0).registers, [0x207, 576, 840, 0]);
    assert_eq!(c("EPYC-Milan").query(0xd, 9).registers, [8, 832, 0, 0]);
    assert_eq!(c("EPYC-Milan").query(0xd, 1).registers, [15, 0, 0, 0]);
    assert_eq!(c("EPYC-Milan").query(0xd, 77).registers, [0; 4]);
    assert_eq!(c("SapphireRapids").query(0xd, 0).registers[0], 0x6_02e7);
    assert_eq!(c("SapphireRapids").query(0xd, 18).registers, [8192, 2816, 6, 0]);
}

#[test]
fn wide_addresses_are_told() {
    let eax = |name| cpuid(name, Topology::flat(1), 0).query(0x8000_0008, 0).registers[0];
    assert_eq!((eax("Nehalem"), eax("SapphireRapids")), (48 << 8 | 40, 57 << 8 | 40));
}

#[test]
fn leaves_are_listed_once_each() {
    let all = cpuid("SapphireRapids", layout(1, 2, 2, 2), 0).leaves();
    let count = |leaf| all.iter().filter(|(l, ..)| *l == leaf).count();
    assert_eq!([4, 0xb, 0x1f, 0xd].map(count), [4, 2, 3, 2 + 7]);
    assert!(all.windows(2).all(|w| (w[0].0, w[0].1) < (w[1].0, w[1].1)));
}

proptest! {
    #[test]
    fn every_question_is_answered(
        leaf in prop_oneof![0..0x40_u32, 0x8000_0000..0x8000_0040_u32, any::<u32>()],
        subleaf: u32, dies in 1..5_u32, cores in 1..20_u32, threads in 1..3_u32, which in 0..90_usize,
    ) {
        let all = crate::models();
        let t = layout(2, dies, cores, threads);
        let last = t.cpus() - 1;
        let _ = Cpuid::new(all[which % all.len()].clone(), t, last, u32::MAX, 52).query(leaf, subleaf);
    }
}
