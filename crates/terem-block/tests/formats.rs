//! The formats of other programs, against QEMU's tools both ways: what they make is read right, and what is written is read right by them.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::fs;
use std::path::{Path, PathBuf};

use peer::{Model, Random, Scratch, run, str, try_run};
use terem_block::{
    AioEngine, BackingFile, BlockBackend, Cache, ConvertOptions, CreateOptions, Disk, Format, Op, OpenError,
    OpenOptions, create,
};

const MIB: u64 = 1 << 20;

/// A way to make an image.
struct Shape {
    format: Format,
    /// As for `qemu-img create -o`.
    options: &'static str,
    size: u64,
    /// Bytes of a block, for the length of requests.
    unit: u64,
}

const fn shape(format: Format, options: &'static str, size: u64, unit: u64) -> Shape {
    Shape { format, options, size, unit }
}

const SHAPES: &[Shape] = &[
    shape(Format::Vdi, "", 5 * MIB, MIB),
    shape(Format::Vdi, "", 3 * MIB + 512, MIB),
    shape(Format::Vdi, "static=on", 5 * MIB, MIB),
    shape(Format::Vhd, "", 5 * MIB, 2 * MIB),
    shape(Format::Vhd, "force_size=on", 5 * MIB + 512, 2 * MIB),
    shape(Format::Vhd, "subformat=fixed,force_size=on", 3 * MIB, MIB),
    shape(Format::Vhd, "subformat=fixed", 3 * MIB, MIB),
    shape(Format::Vhdx, "block_size=1M", 5 * MIB, MIB),
    shape(Format::Vhdx, "block_size=1M,block_state_zero=off", 5 * MIB + 512, MIB),
    shape(Format::Vhdx, "block_size=2M,log_size=2M", 5 * MIB, 2 * MIB),
    shape(Format::Vhdx, "subformat=fixed", 9 * MIB, MIB),
    shape(Format::Vmdk, "", 5 * MIB, 65536),
    shape(Format::Vmdk, "adapter_type=lsilogic,hwversion=7,zeroed_grain=on", 5 * MIB + 512, 65536),
    shape(Format::Vmdk, "subformat=monolithicFlat", 3 * MIB, 65536),
    shape(Format::Vmdk, "subformat=twoGbMaxExtentSparse,compat6=on", 3 * MIB, 65536),
    shape(Format::Vmdk, "subformat=twoGbMaxExtentFlat", 3 * MIB + 512, 65536),
    shape(Format::Vmdk, "subformat=streamOptimized", 5 * MIB, 65536),
];

fn options(format: Format, aio: AioEngine) -> OpenOptions {
    OpenOptions { format: Some(format), cache: Cache::Unsafe, ..peer::options(aio) }
}

fn qemu_create(image: &Path, shape: &Shape) {
    let size = shape.size.to_string();
    let mut args = vec!["create", "-q", "-f", shape.format.name()];
    if !shape.options.is_empty() {
        args.extend(["-o", shape.options]);
    }
    args.extend([str(image), &size]);
    run("qemu-img", &args);
}

fn our_create(image: &Path, shape: &Shape) {
    create(image, &create_options(shape)).expect("made");
}

fn create_options(shape: &Shape) -> CreateOptions {
    let mut options = CreateOptions { overwrite: true, ..CreateOptions::new(shape.format, shape.size) };
    for setting in shape.options.split(',').filter(|s| !s.is_empty()) {
        let (name, value) = setting.split_once('=').expect("name=value");
        let known = shape.format.create_options();
        let option = known.iter().find(|o| o.name == name).unwrap_or_else(|| panic!("no option {name}"));
        (option.set)(&mut options, value).expect("a good value");
    }
    options
}

/// `qemu-img check`, where it can, and our own.
fn assert_clean(format: Format, image: &Path) {
    let out = try_run("qemu-img", &["check", "-f", format.name(), str(image)]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    // 63: this format has no check.
    assert!(matches!(out.status.code(), Some(0 | 63)), "{}: {text}", out.status);
    let report = terem_block::check(image, Some(format)).expect("checked");
    assert!(report.is_clean(), "{report:?}");
}

/// QEMU must read what the model says.
fn assert_qemu_reads(scratch: &Scratch, format: Format, image: &Path, model: &Model) {
    let raw = scratch.write("model.raw", &model.0);
    run("qemu-img", &["compare", "-f", "raw", "-F", format.name(), str(&raw), str(image)]);
}

/// Random requests by us and by QEMU in turns; after each turn both must read what the model says.
fn exercise(scratch: &Scratch, image: &Path, shape: &Shape, model: &mut Model, seed: u64) {
    let mut random = Random(seed);
    for turn in 0..3 {
        let aio = if (seed + turn).is_multiple_of(2) { AioEngine::Auto } else { AioEngine::Threads };
        let disk = Disk::open(image, &options(shape.format, aio)).expect("opened");
        assert_eq!(disk.size(), model.0.len() as u64);
        model.assert_equals(&disk);
        if turn == 1 {
            drop(disk);
            if shape.options.contains("streamOptimized") {
                // QEMU writes a grain once only.
                continue;
            }
            qemu_steps(image, shape.format, model, &mut random);
            continue;
        }
        for _ in 0..40 {
            model.step(&disk, &mut random, shape.unit);
        }
        model.assert_equals(&disk);
        disk.close().expect("closed");
        assert_clean(shape.format, image);
        assert_qemu_reads(scratch, shape.format, image, model);
    }
}

/// Some writes by qemu-io.
fn qemu_steps(image: &Path, format: Format, model: &mut Model, random: &mut Random) {
    let mut args = vec!["-f".to_owned(), format.name().to_owned()];
    for _ in 0..8 {
        let size = model.0.len() as u64;
        let length = 512 * (1 + random.below(300));
        let offset = 512 * random.below((size - length) / 512);
        let value = random.below(255) as u8;
        args.extend(["-c".to_owned(), format!("write -P {value} {offset} {length}")]);
        model.0[offset as usize..(offset + length) as usize].fill(value);
    }
    args.push(str(image).to_owned());
    run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
}

/// What the disk's size became, which may be rounded.
fn new_model(image: &Path, shape: &Shape) -> Model {
    let info = terem_block::info(image, Some(shape.format)).expect("info");
    assert_eq!(info.format, shape.format);
    let text = run("qemu-img", &["info", "-f", shape.format.name(), "--output=json", str(image)]);
    let qemu: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(qemu["virtual-size"], info.virtual_size, "{}", shape.options);
    assert_eq!(qemu["cluster-size"].as_u64(), info.cluster_size, "{}", shape.options);
    Model(vec![0; info.virtual_size as usize])
}

fn with_format(format: Format) {
    let scratch = Scratch::new();
    for (i, shape) in SHAPES.iter().enumerate().filter(|(_, shape)| shape.format == format) {
        eprintln!("{} {}", format.name(), shape.options);
        let theirs = scratch.path(&format!("theirs{i}.{}", format.name()));
        qemu_create(&theirs, shape);
        let mut model = new_model(&theirs, shape);
        exercise(&scratch, &theirs, shape, &mut model, i as u64);
        let ours = scratch.path(&format!("ours{i}.{}", format.name()));
        our_create(&ours, shape);
        assert_clean(format, &ours);
        let mut model = new_model(&ours, shape);
        exercise(&scratch, &ours, shape, &mut model, 100 + i as u64);
        converted(&scratch, shape, &model);
    }
}

/// qemu-img converts to an image that we read, and we to one that it reads.
fn converted(scratch: &Scratch, shape: &Shape, model: &Model) {
    let (name, raw) = (shape.format.name(), scratch.write("source.raw", &model.0));
    let theirs: PathBuf = scratch.path(&format!("converted.{name}"));
    let mut args = vec!["convert", "-f", "raw", "-O", name];
    if !shape.options.is_empty() {
        args.extend(["-o", shape.options]);
    }
    args.extend([str(&raw), str(&theirs)]);
    run("qemu-img", &args);
    let disk = Disk::open(&theirs, &options(shape.format, AioEngine::Auto)).expect("opened");
    let got = peer::read(&disk, 0, model.0.len()).expect("read");
    assert!(got == model.0, "{name} {}: another disk", shape.options);
    drop(disk);

    let ours = scratch.path(&format!("ours.{name}"));
    our_create(&ours, &Shape { size: model.0.len() as u64, ..*shape });
    let disk = Disk::open(&ours, &options(shape.format, AioEngine::Auto)).expect("opened");
    for (i, piece) in model.0.chunks(MIB as usize).enumerate() {
        if piece.iter().any(|&b| b != 0) {
            peer::write(&disk, i as u64 * MIB, piece).expect("written");
        }
    }
    disk.close().expect("closed");
    assert_clean(shape.format, &ours);
    assert_qemu_reads(scratch, shape.format, &ours, model);
    fs::remove_file(&ours).expect("removed");

    // By our own converter: there, over what is there already, and back.
    for _ in 0..2 {
        let target = create_options(&Shape { size: model.0.len() as u64, ..*shape });
        terem_block::convert(
            &raw,
            &open(Format::Raw),
            &ours,
            &target,
            &ConvertOptions::default(),
            &mut |_, _| true,
        )
        .expect("converted");
        assert_clean(shape.format, &ours);
        assert_qemu_reads(scratch, shape.format, &ours, model);
    }
    let back = scratch.path("back.raw");
    let target = CreateOptions { format: Format::Raw, overwrite: true, ..CreateOptions::default() };
    for image in [&ours, &theirs] {
        terem_block::convert(
            image,
            &open(shape.format),
            &back,
            &target,
            &ConvertOptions::default(),
            &mut |_, _| true,
        )
        .expect("converted");
        assert!(fs::read(&back).expect("read") == model.0, "{name} {}: another disk", shape.options);
    }
    fs::remove_file(&ours).expect("removed");
    fs::remove_file(&theirs).expect("removed");
}

fn open(format: Format) -> OpenOptions {
    OpenOptions { format: Some(format), ..OpenOptions::default() }
}

#[test]
fn vdi() {
    with_format(Format::Vdi);
}

#[test]
fn vhd() {
    with_format(Format::Vhd);
}

#[test]
fn vhdx() {
    with_format(Format::Vhdx);
}

#[test]
fn vmdk() {
    with_format(Format::Vmdk);
}

/// Parents as QEMU makes them, and as we do; a parent that was written makes its children unusable.
#[test]
fn vmdk_parents() {
    let scratch = Scratch::new();
    let mut random = Random(11);
    let base = scratch.path("base.vmdk");
    run("qemu-img", &["create", "-q", "-f", "vmdk", str(&base), "3M"]);
    let mut model = Model(vec![0; 3 * MIB as usize]);
    qemu_steps(&base, Format::Vmdk, &mut model, &mut random);
    for (i, setting) in
        ["zeroed_grain=off", "zeroed_grain=on", "subformat=streamOptimized"].iter().enumerate()
    {
        let theirs = scratch.path(&format!("theirs{i}.vmdk"));
        let ours = scratch.path(&format!("ours{i}.vmdk"));
        let base_args = ["-b", "base.vmdk", "-F", "vmdk"];
        run(
            "qemu-img",
            &[&["create", "-q", "-f", "vmdk", "-o", setting], &base_args[..], &[str(&theirs)]].concat(),
        );
        let mut options = CreateOptions {
            backing: Some(BackingFile { path: "base.vmdk".into(), format: Format::Vmdk }),
            format: Format::Vmdk,
            ..CreateOptions::default()
        };
        let (name, value) = setting.split_once('=').expect("a setting");
        let option = Format::Vmdk.create_options().iter().find(|o| o.name == name).expect("known");
        (option.set)(&mut options, value).expect("right");
        create(&ours, &options).expect("made");
        let info = terem_block::info(&ours, None).expect("info").vmdk.expect("vmdk");
        let parent = terem_block::info(&base, None).expect("info").vmdk.expect("vmdk");
        assert_eq!((info.parent.as_deref(), info.parent_cid), (Some("base.vmdk"), parent.cid));
        let shape = shape(Format::Vmdk, setting, 3 * MIB, 65536);
        let before = fs::read(&base).expect("read");
        for image in [&theirs, &ours] {
            let mut model = Model(model.0.clone());
            exercise(&scratch, image, &shape, &mut model, i as u64);
        }
        assert!(before == fs::read(&base).expect("read"), "the parent was changed");
    }
    // Zeroes hide what the parent has, and it is known that they are zeroes.
    let child = scratch.path("ours1.vmdk");
    let disk = Disk::open(&child, &options(Format::Vmdk, AioEngine::Auto)).expect("opened");
    disk.run(Op::WriteZeroes { offset: 65536, length: 65536, unmap: true }).expect("zeroed");
    assert_eq!(peer::read(&disk, 65536, 65536).expect("read"), vec![0; 65536]);
    drop(disk);
    let cid = |image: &Path| terem_block::info(image, None).expect("info").vmdk.expect("vmdk").cid;
    let before = cid(&base);
    let disk = Disk::open(&base, &options(Format::Vmdk, AioEngine::Auto)).expect("opened");
    assert_eq!(cid(&base), before, "not before the first write");
    peer::write(&disk, 0, &[1; 512]).expect("written");
    drop(disk);
    assert_ne!(cid(&base), before);
    let e = Disk::open(&child, &OpenOptions::default()).expect_err("the parent is another one now");
    assert!(e.to_string().contains("parent"), "{e}");
}

/// Extents are opened beside the descriptor only.
#[test]
fn vmdk_extents_stay_beside_the_descriptor() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("vm")).expect("made");
    let secret = scratch.write("secret", &[7; 4096]);
    scratch.write("vm/flat", &[8; 4096]);
    std::os::unix::fs::symlink(&secret, scratch.path("vm/link")).expect("linked");
    let descriptor = |line: &str| {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n{line}\n"
        );
        scratch.write("vm/disk.vmdk", text.as_bytes())
    };
    let open = |line: &str| Disk::open(descriptor(line), &OpenOptions::read_only());
    let disk = open("RW 8 FLAT \"flat\" 0").expect("opened");
    assert_eq!(peer::read(&disk, 0, 4096).expect("read"), vec![8; 4096]);
    drop(disk);
    let absolute = format!("RW 8 FLAT \"{}\" 0", str(&secret));
    for line in ["RW 8 FLAT \"../secret\" 0", "RW 8 FLAT \"link\" 0", &absolute, "RW 8 FLAT \"nbd:x\" 0"] {
        let e = open(line).expect_err(line);
        assert!(matches!(e, OpenError::BackingRefused { .. }), "{line}: {e}");
        assert!(terem_block::info(scratch.path("vm/disk.vmdk"), None).is_err(), "{line}");
    }
    for (line, reason) in [
        ("RW 9 FLAT \"flat\" 0", "truncated"),
        ("RW 8 FLAT \"flat\" 1", "truncated"),
        ("RW 4 FLAT \"flat\" 0\nRW 4 FLAT \"flat\" 4", "two of its extents"),
        ("RW 8 FLAT \"disk.vmdk\" 0", "two of its extents"),
        ("RW 8 SPARSE \"flat\"", "no sparse VMDK extent"),
        ("RW 8 SESPARSE \"flat\"", "SESPARSE"),
        ("", "no extents"),
    ] {
        let e = open(line).expect_err(line).to_string();
        assert!(e.contains(reason), "{line}: {e}");
    }
    let disk = open("RW 4 FLAT \"flat\" 4\nRW 4 ZERO").expect("opened");
    assert_eq!(peer::read(&disk, 0, 4096).expect("read"), [[8; 2048], [0; 2048]].concat());
}

/// A place that was lost in a crash is used again, without what was written there.
#[test]
fn lost_places_come_back_empty() {
    let scratch = Scratch::new();
    for (format, setting) in [
        (Format::Vdi, "static=off"),
        (Format::Vhd, "force_size=on"),
        (Format::Vhdx, "block_size=1M"),
        (Format::Vmdk, "zeroed_grain=off"),
    ] {
        let image = scratch.path(&format!("lost.{}", format.name()));
        our_create(&image, &shape(format, setting, 4 * MIB, MIB));
        let options = peer::options(AioEngine::Threads);
        let disk = Disk::open(&image, &options).expect("opened");
        peer::write(&disk, 0, &vec![0xee; 3 * MIB as usize]).expect("written");
        disk.abandon();
        let length = fs::metadata(&image).expect("there").len();
        let disk = Disk::open(&image, &options).expect("opened");
        assert_eq!(peer::read(&disk, 0, 4 * MIB as usize).expect("read"), vec![0; 4 * MIB as usize]);
        let mut model = Model(vec![0; 4 * MIB as usize]);
        for at in [MIB as usize + 1000, 2 * MIB as usize + 70_000, 100] {
            peer::write(&disk, at as u64, &[0x11; 5000]).expect("written");
            model.0[at..at + 5000].fill(0x11);
        }
        model.assert_equals(&disk);
        disk.close().expect("closed");
        assert_eq!(terem_block::check(&image, None).expect("checked").errors, 0);
        assert_qemu_reads(&scratch, format, &image, &model);
        let now = fs::metadata(&image).expect("there").len();
        assert!(now <= length + 512, "{}: {length} bytes became {now}", format.name());
    }
}
