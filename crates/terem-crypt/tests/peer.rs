//! Headers against cryptsetup, both ways. It needs no device mapper for what is done here.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use terem_crypt::*;

const MIB: u64 = 1 << 20;

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, contents: &str) -> PathBuf {
        fs::write(self.path(name), contents).unwrap();
        self.path(name)
    }
}

/// Runs cryptsetup; whether it succeeded.
fn cryptsetup(arguments: &[&str], files: &[&Path]) -> bool {
    let output = Command::new("cryptsetup").arg("-q").args(arguments).args(files).output();
    output.expect("cryptsetup is installed (guest/setup --test)").status.success()
}

fn opens(image: &Path, passphrase: &Path) -> bool {
    cryptsetup(&["open", "--test-passphrase", "-d"], &[passphrase, image])
}

fn with<T>(image: &Path, work: impl FnOnce(&FileArea<'_>) -> T) -> T {
    let file = fs::OpenOptions::new().read(true).write(true).open(image).unwrap();
    let len = file.metadata().unwrap().len();
    work(&FileArea::new(&file, 0, len))
}

fn pass(text: &str) -> Passphrase {
    Passphrase::new(text.into())
}

/// The volume key as cryptsetup has it.
fn volume_key(dir: &Dir, image: &Path, passphrase: &Path) -> Vec<u8> {
    let out = dir.path("volume-key");
    let _ = fs::remove_file(&out);
    let arguments = ["luksDump", "--dump-volume-key", "--volume-key-file", out.to_str().unwrap(), "-d"];
    assert!(cryptsetup(&arguments, &[passphrase, image]));
    fs::read(out).unwrap()
}

#[test]
fn what_cryptsetup_makes_opens() {
    let dir = Dir::new();
    let (one, two) = (dir.file("one", "first passphrase"), dir.file("two", "second\n\0bytes"));
    let luks1 = ["--type", "luks1", "--pbkdf-force-iterations", "1000"];
    let luks2 = ["--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let argon2 = |kind| {
        ["--type", "luks2", "--pbkdf", kind, "--pbkdf-force-iterations", "4", "--pbkdf-memory", "1024"]
    };
    let cases: [(&[&str], &[&str]); 12] = [
        (&luks1, &[]),
        (&luks1, &["--cipher", "aes-xts-plain64", "--key-size", "256", "--hash", "sha512"]),
        (&luks1, &["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--hash", "sha1"]),
        (&luks1, &["--cipher", "aes-cbc-plain64", "--key-size", "128", "--hash", "ripemd160"]),
        (&luks1, &["--cipher", "aes-cbc-plain", "--key-size", "192"]),
        (&luks2, &[]),
        (&luks2, &["--sector-size", "512", "--hash", "sha512"]),
        (&luks2, &["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--label", "a label"]),
        (&luks2, &["--luks2-metadata-size", "64k", "--luks2-keyslots-size", "1m"]),
        (&argon2("argon2i"), &[]),
        (&argon2("argon2id"), &["--pbkdf-parallel", "1"]),
        (&argon2("argon2id"), &["--pbkdf-parallel", "4"]),
    ];
    for (i, (kind, more)) in cases.iter().enumerate() {
        let image = dir.file(&format!("image{i}"), "");
        fs::File::options().write(true).open(&image).unwrap().set_len(24 * MIB).unwrap();
        let format: Vec<_> = ["luksFormat"].iter().chain(*kind).chain(*more).copied().collect();
        assert!(cryptsetup(&format, &[&image, &one]), "{format:?}");
        let cost: Vec<_> = ["luksAddKey"].iter().chain(&kind[2..]).chain(&["-d"]).copied().collect();
        assert!(cryptsetup(&cost, &[&one, &image, &two]), "{cost:?}");
        let expected = volume_key(&dir, &image, &one);
        with(&image, |area| {
            let luks = Luks::read(area).unwrap();
            for (slot, text) in ["first passphrase", "second\n\0bytes"].into_iter().enumerate() {
                let (key, opened) = luks.unlock(area, &pass(text), None, Limits::default()).unwrap();
                assert_eq!((key.bytes(), opened), (&expected[..], slot), "{format:?}");
            }
            let wrong = luks.unlock(area, &pass("first passphras"), None, Limits::default());
            assert!(matches!(wrong, Err(CryptError::WrongPassphrase)));
            let info = luks.info().unwrap();
            assert_eq!(info.slots.len(), 2);
            if more.contains(&"a label") {
                assert_eq!(info.label, "a label");
            }
        });
    }
}

#[test]
fn what_we_make_and_change_cryptsetup_opens() {
    let dir = Dir::new();
    let (one, two, three) = (dir.file("1", "one"), dir.file("2", "two"), dir.file("3", "three"));
    let spec = |name| CipherSpec::parse(name).unwrap();
    let cheap = Cost::Iterations(1000);
    for (version, spec, key_len, hash, cost, sector_size) in [
        (1, spec("aes-xts-plain64"), 64, Hash::Sha256, cheap, 512),
        (1, spec("aes-cbc-essiv:sha256"), 16, Hash::Sha1, cheap, 512),
        (
            1,
            spec("aes-xts-plain64"),
            32,
            Hash::Ripemd160,
            Cost::Time(std::time::Duration::from_millis(1)),
            512,
        ),
        (
            2,
            spec("aes-xts-plain64"),
            64,
            Hash::Sha256,
            Cost::Argon2 { memory: 1024, passes: 4, lanes: 2 },
            512,
        ),
        (2, spec("aes-cbc-plain64"), 32, Hash::Sha512, cheap, 4096),
    ] {
        let image = dir.file("image", "");
        let file = fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
        file.set_len(0).unwrap();
        file.set_len(20 * MIB).unwrap();
        drop(file);
        let first = with(&image, |area| match version {
            1 => {
                let options = Luks1Options { spec, key_len, hash, cost, data_align: MIB };
                format_luks1(area, &options, &pass("one")).unwrap()
            }
            _ => {
                let options = Luks2Options { spec, key_len, hash, cost, sector_size, data_offset: 16 * MIB };
                format_luks2(area, &options, &pass("one")).unwrap()
            }
        });
        assert!(cryptsetup(&["isLuks", "--type", if version == 1 { "luks1" } else { "luks2" }], &[&image]));
        assert_eq!(volume_key(&dir, &image, &one), first.bytes());

        with(&image, |area| {
            let mut luks = Luks::read(area).unwrap();
            luks.add_key(area, &first, &pass("two"), None, cost).unwrap();
        });
        assert!(opens(&image, &one) && opens(&image, &two) && !opens(&image, &three));
        // Theirs after ours, and ours after theirs.
        let add = ["luksAddKey", "--pbkdf-force-iterations", "1000", "--pbkdf", "pbkdf2", "-d"];
        assert!(cryptsetup(&add, &[&two, &image, &three]));
        with(&image, |area| {
            let mut luks = Luks::read(area).unwrap();
            luks.change_key(area, &first, 0, &pass("two again"), cost).unwrap();
            luks.remove_key(area, 1).unwrap();
        });
        let again = dir.file("again", "two again");
        assert!(
            !opens(&image, &one) && !opens(&image, &two) && opens(&image, &three) && opens(&image, &again)
        );
        assert_eq!(volume_key(&dir, &image, &again), first.bytes());
        assert!(cryptsetup(&["luksKillSlot", "-d", again.to_str().unwrap()], &[&image, Path::new("2")]));
        with(&image, |area| {
            let luks = Luks::read(area).unwrap();
            assert!(luks.unlock(area, &pass("three"), None, Limits::default()).is_err());
            assert!(luks.unlock(area, &pass("two again"), None, Limits::default()).is_ok());
            assert!(!luks.info().unwrap().degraded);
        });
    }
}

/// Tokens, flags and priorities that cryptsetup wrote are there after our changes.
#[test]
fn what_others_wrote_into_the_metadata_stays() {
    let dir = Dir::new();
    let (one, two) = (dir.file("1", "one"), dir.file("2", "two"));
    let image = dir.file("image", "");
    fs::File::options().write(true).open(&image).unwrap().set_len(20 * MIB).unwrap();
    let cost = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let format: Vec<_> = ["luksFormat", "--type", "luks2"].into_iter().chain(cost).collect();
    assert!(cryptsetup(&format, &[&image, &one]));
    let add: Vec<_> = ["luksAddKey"].into_iter().chain(cost).chain(["-d"]).collect();
    assert!(cryptsetup(&add, &[&one, &image, &two]));
    assert!(cryptsetup(&["config", "--priority", "prefer", "--key-slot", "1"], &[&image]));
    let token = ["token", "add", "--key-description", "from the test", "--key-slot", "0"];
    assert!(cryptsetup(&token, &[&image]));
    with(&image, |area| {
        let mut luks = Luks::read(area).unwrap();
        let (key, _) = luks.unlock(area, &pass("one"), None, Limits::default()).unwrap();
        luks.change_key(area, &key, 1, &pass("three"), Cost::Iterations(1000)).unwrap();
    });
    let dump = Command::new("cryptsetup").arg("luksDump").arg(&image).output().unwrap();
    let dump = String::from_utf8(dump.stdout).unwrap();
    assert!(dump.contains("luks2-keyring") && dump.contains("from the test"), "{dump}");
    assert!(dump.contains("preferred"), "{dump}");
    assert!(opens(&image, &one) && !opens(&image, &two));
}

/// What cannot be read right is refused, with a reason.
#[test]
fn a_reencryption_under_way_is_refused() {
    let dir = Dir::new();
    let one = dir.file("1", "one");
    let image = dir.file("image", "");
    fs::File::options().write(true).open(&image).unwrap().set_len(40 * MIB).unwrap();
    let cost = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let format: Vec<_> = ["luksFormat", "--type", "luks2"].into_iter().chain(cost).collect();
    assert!(cryptsetup(&format, &[&image, &one]));
    let start: Vec<_> = ["reencrypt", "--init-only"].into_iter().chain(cost).chain(["-d"]).collect();
    assert!(cryptsetup(&start, &[&one, &image]));
    let error = with(&image, |area| Luks::read(area).err().map(|e| e.to_string()));
    assert!(error.as_ref().is_some_and(|e| e.contains("re-encryption")), "{error:?}");
}
