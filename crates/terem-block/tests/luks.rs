//! Encrypted images against QEMU and cryptsetup, both ways: LUKS by itself, within qcow2, and the old AES.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::fs;
use std::path::{Path, PathBuf};

use peer::{Model, Random, Scratch, read, run, str, try_run, write};
use terem_block::{
    AioEngine, BackingFile, BlockBackend, ConvertOptions, Cost, CreateOptions, CryptError, Disk,
    EncryptionOptions, Format, IoError, KeyOptions, Keys, Op, OpenError, OpenOptions, Passphrase,
    Preallocation, convert, create,
};

const MIB: u64 = 1 << 20;
const CHEAP: Cost = Cost::Iterations(1000);

fn pass(text: &str) -> Passphrase {
    Passphrase::new(text.into())
}

fn keys(text: &str) -> Keys {
    Keys::every(pass(text))
}

fn open_options() -> OpenOptions {
    OpenOptions { keys: keys("secret"), ..OpenOptions::default() }
}

fn open(image: &Path) -> Disk {
    Disk::open(image, &open_options()).expect("opened")
}

fn options(format: Format, size: u64) -> CreateOptions {
    let encryption = EncryptionOptions { cost: CHEAP, ..EncryptionOptions::default() };
    CreateOptions { encryption, keys: keys("secret"), ..CreateOptions::new(format, size) }
}

/// `options` with settings as text.
fn with(format: Format, size: u64, text: &str) -> CreateOptions {
    let mut options = options(format, size);
    for (name, value) in text.split(',').filter_map(|setting| setting.split_once('=')) {
        let option = format.create_options().iter().find(|o| o.name == name);
        (option.unwrap_or_else(|| panic!("{name}")).set)(&mut options, value).expect(name);
    }
    // A given time would make the costs differ from run to run.
    options.encryption.cost = CHEAP;
    options
}

/// QEMU's tools with the passphrase at hand.
struct Qemu {
    scratch: Scratch,
    object: String,
}

impl Qemu {
    fn new() -> Self {
        let scratch = Scratch::new();
        let file = scratch.write("passphrase", b"secret");
        Self { object: format!("secret,id=s,file={}", str(&file)), scratch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    fn run(&self, tool: &str, args: &[&str]) -> String {
        // qemu-img takes the object after the command, qemu-io before.
        if tool == "qemu-img" {
            let all: Vec<_> = [args[0], "--object", &self.object].iter().chain(&args[1..]).copied().collect();
            return run(tool, &all);
        }
        let all: Vec<_> = ["--object", &self.object].iter().chain(args).copied().collect();
        run(tool, &all)
    }

    /// How QEMU is told to open `image`.
    fn image_options(image: &Path) -> String {
        let info = terem_block::info(image, None).expect("told");
        if info.format == Format::Luks {
            return format!("driver=luks,key-secret=s,file.filename={}", str(image));
        }
        // Opened this way, QEMU does not look beside the image for its data file.
        let data = info.qcow2.and_then(|qcow2| qcow2.data_file).map_or_else(String::new, |name| {
            let data = image.with_file_name(name);
            format!(",data-file.driver=file,data-file.filename={}", str(&data))
        });
        format!("driver=qcow2,encrypt.key-secret=s,file.filename={}{data}", str(image))
    }

    /// QEMU must read what the model says.
    fn assert_reads(&self, model: &Model, image: &Path) {
        let raw = self.scratch.write("model.raw", &model.0);
        let raw = format!("driver=raw,file.filename={}", str(&raw));
        self.run("qemu-img", &["compare", "--image-opts", &raw, &Self::image_options(image)]);
    }

    /// QEMU writes pattern after pattern.
    fn write(&self, model: &mut Model, random: &mut Random, image: &Path) {
        let mut commands = Vec::new();
        for _ in 0..20 {
            let length = (1 + random.below(200)) * 512;
            let offset = random.below((model.0.len() as u64 - length) / 512) * 512;
            let pattern = (1 + random.below(255)) as u8;
            commands.push("-c".to_owned());
            commands.push(format!("write -P {pattern} {offset} {length}"));
            model.0[offset as usize..(offset + length) as usize].fill(pattern);
        }
        let options = Self::image_options(image);
        let mut args: Vec<&str> = commands.iter().map(String::as_str).collect();
        args.extend(["--image-opts", options.as_str()]);
        self.run("qemu-io", &args);
    }
}

/// Random requests of ours and of QEMU's, one after the other; both must always read the same.
fn play(qemu: &Qemu, image: &Path, model: &mut Model, seed: u64) {
    let mut random = Random(seed);
    for aio in [AioEngine::Auto, AioEngine::Threads] {
        let disk = Disk::open(image, &OpenOptions { aio, ..open_options() }).expect("opened");
        for _ in 0..60 {
            model.step(&disk, &mut random, 65536);
        }
        model.assert_equals(&disk);
        disk.close().expect("closed");
        qemu.assert_reads(model, image);
        qemu.write(model, &mut random, image);
        model.assert_equals(&open(image));
    }
}

/// What the disk holds now: a new LUKS image reads as anything.
fn model_of(image: &Path) -> Model {
    let disk = open(image);
    Model(read(&disk, 0, disk.size() as usize).expect("read"))
}

/// A new LUKS 1 image of 3 MiB by cryptsetup, which is much quicker at that than QEMU.
fn by_cryptsetup(qemu: &Qemu, name: &str, choice: &[&str]) -> PathBuf {
    let (image, passphrase) = (qemu.path(name), qemu.path("passphrase"));
    fs::write(&image, vec![0; 5 << 20]).expect("written");
    let format = ["luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000"];
    run("cryptsetup", &[&format[..], choice, &[str(&image), str(&passphrase)]].concat());
    image
}

#[test]
fn luks1_made_by_others() {
    let qemu = Qemu::new();
    let image = qemu.path("qemu.luks");
    let options = "key-secret=s,iter-time=1";
    qemu.run("qemu-img", &["create", "-q", "-f", "luks", "-o", options, str(&image), "3m"]);
    let mut images = vec![image];
    for (i, choice) in [
        &["--cipher", "aes-xts-plain64", "--key-size", "256"][..],
        &["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--hash", "sha1"],
        &["--cipher", "aes-cbc-plain64", "--key-size", "128", "--hash", "sha512"],
        &["--cipher", "aes-xts-plain", "--hash", "ripemd160", "--align-payload", "8"],
    ]
    .iter()
    .enumerate()
    {
        images.push(by_cryptsetup(&qemu, &format!("{i}.luks"), choice));
    }
    for (seed, image) in images.iter().enumerate() {
        let mut model = model_of(image);
        qemu.assert_reads(&model, image);
        play(&qemu, image, &mut model, seed as u64);
    }
}

#[test]
fn luks1_made_by_us() {
    let qemu = Qemu::new();
    let passphrase = qemu.path("passphrase");
    for (i, choice) in [
        "",
        "cipher-alg=aes-192",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha512",
        "cipher-alg=serpent-256",
        "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=essiv",
    ]
    .iter()
    .enumerate()
    {
        let image = qemu.path(&format!("{i}.luks"));
        let aes = !choice.contains("serpent");
        // The slow ciphers get less to do.
        let size = if aes { 2 * MIB + 512 } else { 160 << 10 };
        create(&image, &with(Format::Luks, size, choice)).expect("made");
        if aes && i != 1 {
            // It leaves the others, and that key length, to the kernel.
            run("cryptsetup", &["open", "--test-passphrase", "-d", str(&passphrase), str(&image)]);
        }
        let info = qemu.run("qemu-img", &["info", str(&image)]);
        assert!(info.contains(&format!("({size} bytes)")) && info.contains("encrypted: yes"), "{info}");
        let mut model = model_of(&image);
        play(&qemu, &image, &mut model, i as u64);
    }
}

/// QEMU does not read LUKS 2: its data are compared through a LUKS 1 header with the same volume key.
#[test]
fn luks2_by_the_same_key_in_luks1() {
    let qemu = Qemu::new();
    let (image, passphrase, key) = (qemu.path("2.luks"), qemu.path("passphrase"), qemu.path("key"));
    let size = MIB;
    create(&image, &with(Format::Luks, size, "luks-version=2")).expect("made");
    run("cryptsetup", &["open", "--test-passphrase", "-d", str(&passphrase), str(&image)]);
    let dump = ["luksDump", "--dump-volume-key", "-q", "--volume-key-file"];
    run("cryptsetup", &[&dump[..], &[str(&key), "-d", str(&passphrase), str(&image)]].concat());
    let twin = qemu.path("1.luks");
    fs::write(&twin, vec![0; (2 * MIB + size) as usize]).expect("written");
    let format =
        ["luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--volume-key-file"];
    run("cryptsetup", &[&format[..], &[str(&key), str(&twin), str(&passphrase)]].concat());

    let copy = |from: &Path, from_at: u64, to: &Path, to_at: u64| {
        let data = fs::read(from).expect("read")[from_at as usize..].to_vec();
        let mut whole = fs::read(to).expect("read");
        whole[to_at as usize..][..data.len()].copy_from_slice(&data);
        fs::write(to, whole).expect("written");
    };
    let mut random = Random(7);
    let disk = open(&image);
    let mut model = Model(read(&disk, 0, size as usize).expect("read"));
    for _ in 0..50 {
        model.step(&disk, &mut random, 65536);
    }
    disk.close().expect("closed");
    copy(&image, 16 * MIB, &twin, 2 * MIB);
    qemu.assert_reads(&model, &twin);
    qemu.write(&mut model, &mut random, &twin);
    copy(&twin, 2 * MIB, &image, 16 * MIB);
    model.assert_equals(&open(&image));
}

/// Larger sectors, and a header in a file of its own: cryptsetup encrypts and decrypts what we read and wrote.
#[test]
fn luks2_encrypted_and_decrypted_by_cryptsetup() {
    let qemu = Qemu::new();
    let passphrase = qemu.path("passphrase");
    let mut random = Random(3);
    for sector_size in ["512", "1024", "4096"] {
        let mut model = Model(random.bytes(MIB as usize));
        let image = qemu.scratch.write("disk", &model.0);
        let header = qemu.path(&format!("header{sector_size}"));
        let encrypt = ["reencrypt", "-q", "--encrypt", "--type", "luks2", "--sector-size", sector_size];
        let cost = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        let files = ["--header", str(&header), "-d", str(&passphrase), str(&image)];
        run("cryptsetup", &[&encrypt[..], &cost, &files].concat());
        assert!(fs::read(&image).expect("read") != model.0);

        let mut options = OpenOptions { format: Some(Format::Luks), ..open_options() };
        options.keys.set_header(&image, &header);
        let disk = Disk::open(&image, &options).expect("opened");
        model.assert_equals(&disk);
        for _ in 0..60 {
            model.step(&disk, &mut random, 65536);
        }
        disk.close().expect("closed");
        let decrypt = ["reencrypt", "-q", "--decrypt", "--force-offline-reencrypt"];
        run("cryptsetup", &[&decrypt[..], &files].concat());
        assert!(fs::read(&image).expect("read") == model.0, "{sector_size}");
    }
}

#[test]
fn luks2_sectors_of_4096() {
    let qemu = Qemu::new();
    let image = qemu.path("image");
    create(&image, &with(Format::Luks, MIB, "luks-version=2,sector-size=4096,cipher-mode=cbc"))
        .expect("made");
    let mut model = model_of(&image);
    for (seed, aio) in [(1, AioEngine::Auto), (2, AioEngine::Threads)] {
        let disk = Disk::open(&image, &OpenOptions { aio, ..open_options() }).expect("opened");
        for _ in 0..100 {
            model.step(&disk, &mut Random(seed), 512);
        }
        model.assert_equals(&disk);
    }
    model.assert_equals(&open(&image));
    let error = create(qemu.path("odd"), &with(Format::Luks, 4096 + 512, "luks-version=2,sector-size=4096"));
    assert!(error.expect_err("half a sector").to_string().contains("whole number of sectors"));
}

#[test]
fn qcow2_made_by_qemu() {
    let qemu = Qemu::new();
    let base = qemu.scratch.write("base.raw", &Random(1).bytes(2 << 20));
    // It takes QEMU seconds to make one; of what there is to choose, the rest is tried with images of ours.
    for (i, (options, backed)) in [
        (",extended_l2=on,lazy_refcounts=on", true),
        (",data_file=DATA,cluster_size=4k,encrypt.cipher-alg=aes-128", false),
    ]
    .iter()
    .enumerate()
    {
        let image = qemu.path(&format!("{i}.qcow2"));
        let data = qemu.path(&format!("{i}.data"));
        let options = format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1{options}");
        let options = options.replace("DATA", str(&data));
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if *backed {
            args.extend(["-b", str(&base), "-F", "raw"]);
        }
        args.extend([str(&image), "3m"]);
        qemu.run("qemu-img", &args);
        let mut model = Model(vec![0; 3 << 20]);
        if *backed {
            model.0[..2 << 20].copy_from_slice(&fs::read(&base).expect("read"));
        }
        qemu.write(&mut model, &mut Random(i as u64), &image);
        model.assert_equals(&open(&image));
        play(&qemu, &image, &mut model, 100 + i as u64);
        qemu.run("qemu-img", &["check", "-q", "--image-opts", &Qemu::image_options(&image)]);
        assert!(terem_block::check(&image, None).expect("checked").is_clean());
    }
}

#[test]
fn qcow2_made_by_us() {
    let qemu = Qemu::new();
    let base = qemu.path("base.qcow2");
    create(&base, &with(Format::Qcow2, 2 * MIB, "encrypt.format=luks")).expect("made");
    write(&open(&base), 1000, &[7; 100_000]).expect("written");
    for (i, (choice, backed, preallocation)) in [
        ("", false, Preallocation::Off),
        ("cluster_size=512,encrypt.cipher-alg=aes-128", false, Preallocation::Off),
        ("cluster_size=2M,encrypt.cipher-alg=aes-128", false, Preallocation::Off),
        ("extended_l2=on,cluster_size=16k", true, Preallocation::Off),
        ("compat=v2,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv", true, Preallocation::Off),
        ("data_file=x.data", false, Preallocation::Off),
        ("", false, Preallocation::Metadata),
        ("extended_l2=on", false, Preallocation::Falloc),
        ("", false, Preallocation::Full),
    ]
    .into_iter()
    .enumerate()
    {
        let image = qemu.path(&format!("{i}.qcow2"));
        let choice = format!("encrypt.format=luks,{choice}");
        let mut options = with(Format::Qcow2, 3 * MIB, &choice);
        options.preallocation = preallocation;
        options.backing = backed.then(|| BackingFile { path: base.clone(), format: Format::Qcow2 });
        create(&image, &options).expect("made");
        let mut model = Model(vec![0; 3 << 20]);
        if backed {
            model.0[1000..101_000].fill(7);
        }
        model.assert_equals(&open(&image));
        if backed {
            // QEMU has to be told the backing file's passphrase, too, so it does not play here.
            let mut random = Random(i as u64);
            let disk = open(&image);
            (0..60).for_each(|_| model.step(&disk, &mut random, 16384));
            model.assert_equals(&disk);
        } else {
            play(&qemu, &image, &mut model, i as u64);
        }
        let mut check = Qemu::image_options(&image);
        if backed {
            check += ",backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=";
            check += str(&base);
        }
        qemu.run("qemu-img", &["check", "-q", "--image-opts", &check]);
        assert!(terem_block::check(&image, None).expect("checked").is_clean());
    }
}

/// The old encryption is read, and not written.
#[test]
fn old_aes() {
    let qemu = Qemu::new();
    let image = qemu.path("aes.qcow2");
    let options = "encrypt.format=aes,encrypt.key-secret=s";
    qemu.run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, str(&image), "3m"]);
    let mut model = Model(vec![0; 3 << 20]);
    qemu.write(&mut model, &mut Random(5), &image);
    let error = Disk::open(&image, &open_options()).expect_err("not for writing");
    assert!(error.to_string().contains("readonly=on"), "{error}");
    let disk = Disk::open(&image, &OpenOptions { keys: keys("secret"), ..OpenOptions::read_only() });
    model.assert_equals(&disk.expect("opened"));
    assert_eq!(terem_block::info(&image, None).expect("told").encryption.expect("encrypted").method, "aes");
    let copy = qemu.path("copy.qcow2");
    let options = with(Format::Qcow2, 3 * MIB, "encrypt.format=luks");
    convert(&image, &open_options(), &copy, &options, &ConvertOptions::default(), &mut |_, _| true)
        .expect("converted");
    qemu.assert_reads(&model, &copy);
}

/// What QEMU does not encrypt, nobody writes into an encrypted image.
#[test]
fn compressed_clusters() {
    let qemu = Qemu::new();
    let source = qemu.scratch.write("source.raw", &[5; 1 << 20]);
    let target = qemu.path("target.qcow2");
    let options = with(Format::Qcow2, MIB, "encrypt.format=luks");
    let compress = ConvertOptions { compress: true, ..ConvertOptions::default() };
    let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let error = convert(&source, &raw, &target, &options, &compress, &mut |_, _| true);
    assert!(matches!(error, Err(OpenError::Unsupported { .. })), "{error:?}");
    assert!(!target.exists());
}

/// All of a copy is written, zeroes too, where a new disk reads as anything.
#[test]
fn copies_into_and_out_of_luks() {
    let qemu = Qemu::new();
    let mut bytes = vec![0; 5 << 20];
    bytes[MIB as usize..2 * MIB as usize].copy_from_slice(&Random(9).bytes(1 << 20));
    bytes[3_000_000..3_000_100].fill(3);
    let model = Model(bytes);
    let source = qemu.scratch.write("source.raw", &model.0);
    let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    for (name, choice) in [("1.luks", ""), ("2.luks", "luks-version=2,sector-size=4096")] {
        let image = qemu.path(name);
        let options = with(Format::Luks, 5 * MIB, choice);
        convert(&source, &raw, &image, &options, &ConvertOptions::default(), &mut |_, _| true)
            .expect("converted");
        Model(model.0.clone()).assert_equals(&open(&image));
        let back = qemu.path("back.raw");
        let options = CreateOptions { overwrite: true, ..CreateOptions::new(Format::Raw, 5 * MIB) };
        convert(&image, &open_options(), &back, &options, &ConvertOptions::default(), &mut |_, _| true)
            .expect("converted");
        assert!(fs::read(&back).expect("read") == model.0);

        let imported = qemu.path(&format!("imported.{name}"));
        let options = with(Format::Luks, 5 * MIB, choice);
        terem_block::import(&mut &model.0[..4 << 20], Some(5 * MIB), &imported, &options, &mut |_, _| true)
            .expect("imported");
        Model(model.0.clone()).assert_equals(&open(&imported));
    }
    qemu.assert_reads(&model, &qemu.path("1.luks"));
    let encrypted = qemu.path("encrypted.qcow2");
    let options = with(Format::Qcow2, 5 * MIB, "encrypt.format=luks");
    convert(
        qemu.path("2.luks"),
        &open_options(),
        &encrypted,
        &options,
        &ConvertOptions::default(),
        &mut |_, _| true,
    )
    .expect("converted");
    qemu.assert_reads(&model, &encrypted);
    // Zeroes took no space there.
    let disk = open(&encrypted);
    assert!(disk.block_status(4 * MIB, MIB).expect("told").iter().all(terem_block::Extent::is_zero));
}

#[test]
fn growing() {
    let qemu = Qemu::new();
    let base = qemu.scratch.write("base.raw", &[9; 3 << 20]);
    let image = qemu.path("image.qcow2");
    let mut options = with(Format::Qcow2, MIB, "encrypt.format=luks");
    options.backing = Some(BackingFile { path: base, format: Format::Raw });
    create(&image, &options).expect("made");
    terem_block::resize(&image, None, 4 * MIB, false, Preallocation::Off).expect("resized");
    let mut model = Model(vec![0; 4 << 20]);
    model.0[..1 << 20].fill(9);
    model.assert_equals(&open(&image));
    qemu.assert_reads(&model, &image);

    let luks = qemu.path("image.luks");
    create(&luks, &options_of_luks()).expect("made");
    write(&open(&luks), 0, &[8; 4096]).expect("written");
    terem_block::resize(&luks, None, 2 * MIB, false, Preallocation::Off).expect("resized");
    let disk = open(&luks);
    assert_eq!(disk.size(), 2 * MIB);
    assert_eq!(read(&disk, 0, 4096).expect("read"), [8; 4096]);
}

fn options_of_luks() -> CreateOptions {
    options(Format::Luks, MIB)
}

#[test]
fn passphrases() {
    let qemu = Qemu::new();
    let (luks, qcow2) = (qemu.path("image.luks"), qemu.path("image.qcow2"));
    create(&luks, &options_of_luks()).expect("made");
    create(&qcow2, &with(Format::Qcow2, MIB, "encrypt.format=luks")).expect("made");
    let no_key = CreateOptions { keys: Keys::default(), ..options_of_luks() };
    let error = create(qemu.path("none"), &no_key).expect_err("no passphrase");
    assert!(matches!(error, OpenError::NeedsPassphrase { .. }));
    assert!(!qemu.path("none").exists());
    for image in [&luks, &qcow2] {
        let error = Disk::open(image, &OpenOptions::default()).expect_err("no passphrase");
        assert!(matches!(error, OpenError::NeedsPassphrase { .. }), "{error}");
        let wrong = OpenOptions { keys: keys("Secret"), ..OpenOptions::default() };
        let error = Disk::open(image, &wrong).expect_err("a wrong passphrase");
        let is_wrong =
            |e: &OpenError| matches!(e, OpenError::Encryption { source: CryptError::WrongPassphrase, .. });
        assert!(is_wrong(&error), "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
        // The image's own goes before the one for all.
        let mut own = keys("another");
        own.set(image, pass("secret"));
        Disk::open(image, &OpenOptions { keys: own, ..OpenOptions::default() }).expect("opened");

        let options = KeyOptions { cost: CHEAP, ..KeyOptions::default() };
        let in_use = open(image);
        let error = terem_block::add_key(image, &pass("secret"), &pass("two"), &options);
        assert!(matches!(error, Err(OpenError::Busy { .. })), "{error:?}");
        drop(in_use);
        assert_eq!(terem_block::add_key(image, &pass("secret"), &pass("two"), &options).expect("added"), 1);
        let error = terem_block::add_key(image, &pass("nothing"), &pass("x"), &options);
        assert!(is_wrong(&error.expect_err("a wrong passphrase")));
        assert_eq!(
            terem_block::change_key(image, &pass("two"), &pass("three"), &options).expect("changed"),
            2
        );
        let slot = |slot| KeyOptions { slot: Some(slot), ..options.clone() };
        // Only who can open it without that slot removes it by its number.
        let error = terem_block::remove_key(image, &pass("three"), &slot(2)).expect_err("its own");
        assert!(is_wrong(&error), "{error}");
        assert_eq!(terem_block::remove_key(image, &pass("secret"), &slot(2)).expect("removed"), 2);
        let error = terem_block::remove_key(image, &pass("secret"), &options).expect_err("the last");
        assert!(error.to_string().contains("the last one"), "{error}");
        for (passphrase, opens) in [("secret", true), ("two", false), ("three", false)] {
            let options = OpenOptions { keys: keys(passphrase), ..OpenOptions::default() };
            assert_eq!(Disk::open(image, &options).is_ok(), opens, "{passphrase}");
        }
        let info = terem_block::info(image, None).expect("told").encryption.expect("encrypted");
        assert_eq!(info.luks.expect("LUKS").slots.len(), 1);
        qemu.assert_reads(&model_of(image), image);
    }
    let locked = OpenOptions { keys: Keys::locked(), ..OpenOptions::default() };
    let disk = Disk::open(&qcow2, &locked).expect("opened without");
    assert_eq!(disk.run(Op::WriteZeroes { offset: 0, length: MIB, unmap: false }), Ok(()));
    assert_eq!(write(&disk, 0, &[1; 512]), Err(IoError::Locked));
    let raw = qemu.scratch.write("plain.raw", &[0; 4096]);
    let error = terem_block::add_key(&raw, &pass("x"), &pass("y"), &KeyOptions::default());
    assert!(error.expect_err("not encrypted").to_string().contains("has no LUKS header"));
}

/// Keys that QEMU changed, and that QEMU uses after we changed them.
#[test]
fn keys_with_qemu() {
    let qemu = Qemu::new();
    let image = qemu.path("image.qcow2");
    create(&image, &with(Format::Qcow2, MIB, "encrypt.format=luks")).expect("made");
    let second = qemu.scratch.write("second", b"the second");
    let add = format!("secret,id=n,file={}", str(&second));
    let amend = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1";
    let options = Qemu::image_options(&image);
    run(
        "qemu-img",
        &["amend", "--object", &qemu.object, "--object", &add, "-o", amend, "--image-opts", &options],
    );
    let options = KeyOptions { cost: CHEAP, ..KeyOptions::default() };
    terem_block::change_key(&image, &pass("the second"), &pass("third"), &options).expect("changed");
    terem_block::remove_key(&image, &pass("secret"), &options).expect("removed");
    let read = |file: &Path| {
        let object = format!("secret,id=s,file={}", str(file));
        let options = Qemu::image_options(&image);
        let arguments = ["--object", &object, "-c", "read 0 512", "--image-opts", &options];
        try_run("qemu-io", &arguments).status.success()
    };
    let third = qemu.scratch.write("third", b"third");
    assert!(read(&third) && !read(&second) && !read(&qemu.path("passphrase")));
}

/// Headers that lie about themselves.
#[test]
fn damaged() {
    let qemu = Qemu::new();
    let luks = qemu.path("image.luks");
    create(&luks, &options_of_luks()).expect("made");
    let whole = fs::read(&luks).expect("read");
    // Cut within the header, and before the data.
    for len in [500, 600, 100_000, 1_000_000] {
        let image = qemu.scratch.write("cut", &whole[..len]);
        let options = OpenOptions { format: Some(Format::Luks), ..open_options() };
        Disk::open(&image, &options).expect_err("cut");
    }
    let qcow2 = qemu.path("image.qcow2");
    create(&qcow2, &with(Format::Qcow2, MIB, "encrypt.format=luks")).expect("made");
    let whole = fs::read(&qcow2).expect("read");
    let place = whole.windows(4).position(|w| w == [0x05, 0x37, 0xbe, 0x77]).expect("there") + 8;
    for (what, at, bytes) in [
        ("no LUKS header", place - 8, &[0x11; 4][..]),
        ("its place", place, &[0xff; 8]),
        ("not a cluster's beginning", place + 7, &[1]),
        ("its length", place + 8, &[0xff; 8]),
        ("length zero", place + 8, &[0; 8]),
        ("method", 35, &[3]),
    ] {
        let mut changed = whole.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        let image = qemu.scratch.write("changed.qcow2", &changed);
        assert!(Disk::open(&image, &open_options()).is_err(), "{what}");
        let _ = terem_block::check(&image, None);
        let _ = terem_block::info(&image, None);
    }
}
