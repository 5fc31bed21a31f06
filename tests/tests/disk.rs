//! A guest's disk: what it writes is right, is there after a kill, and pleases qemu-img.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use terem_tests::{Guest, alone, run, succeed, terem};

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn qcow2(dir: &Path, name: &str, size: &str) -> PathBuf {
    let path = dir.join(name);
    succeed(Command::new(terem()).args(["disk", "create"]).arg(&path).arg(size));
    path
}

fn qemu_img_finds_nothing(image: &Path) {
    let text = succeed(Command::new("qemu-img").arg("check").arg(image));
    assert!(text.contains("No errors were found"), "{text}");
}

fn ext4(dir: &Path) -> PathBuf {
    let raw = dir.join("fs.raw");
    succeed(Command::new("truncate").args(["-s", "64M"]).arg(&raw));
    succeed(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-F"]).arg(&raw));
    let image = dir.join("fs.qcow2");
    succeed(
        Command::new(terem())
            .args(["disk", "convert", "--from", "raw", "--to", "qcow2"])
            .arg(&raw)
            .arg(&image),
    );
    image
}

/// The image's contents as a raw file, by qemu-img.
fn contents(image: &Path) -> PathBuf {
    let raw = image.with_extension("contents");
    succeed(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(image).arg(&raw));
    raw
}

#[test]
fn a_disk_over_nbd_is_a_disk() {
    let _one = alone();
    let dir = folder();
    let (image, socket) = (qcow2(dir.path(), "a.qcow2", "64M"), dir.path().join("socket"));
    let mut server = Command::new(terem())
        .args(["disk", "serve", "--once", "--socket"])
        .args([&socket, &image])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !socket.exists() {
        assert!(server.try_wait().unwrap().is_none(), "the server does not start");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let disk = format!("nbd+unix:///?socket={}", socket.display());
    let ended = Guest::minimal("6.1", "blk", "", &["--cpus", "2", "--disk", &disk]).finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("blk-wrote"), ended.value("blk-read"));
    assert_eq!(ended.value("vda-size"), "131072");
    assert!(server.wait().unwrap().success());
    qemu_img_finds_nothing(&image);
    let allocated = succeed(Command::new("qemu-img").args(["map"]).arg(&image));
    assert!(allocated.lines().count() > 1, "nothing was written: {allocated}");
}

#[test]
fn an_encrypted_disk_is_served_with_its_passphrase() {
    let dir = folder();
    let (image, socket) = (dir.path().join("a.luks"), dir.path().join("socket"));
    let passphrase = dir.path().join("passphrase");
    std::fs::write(&passphrase, "secret").unwrap();
    let object = format!("secret,id=s,file={}", passphrase.display());
    let create = ["create", "-q", "-f", "luks", "-o", "key-secret=s,iter-time=10", "--object", &object];
    succeed(Command::new("qemu-img").args(create).arg(&image).arg("4M"));
    let options = format!("driver=luks,key-secret=s,file.filename={}", image.display());
    succeed(Command::new("qemu-io").args([
        "--object",
        &object,
        "--image-opts",
        "-c",
        "write -P 7 1M 70k",
        &options,
    ]));
    let mut server = Command::new(terem())
        .args(["disk", "serve", "--once", "--passphrase", &format!("file:{}", passphrase.display())])
        .arg("--socket")
        .args([&socket, &image])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !socket.exists() {
        assert!(server.try_wait().unwrap().is_none(), "the server does not start");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let disk = format!("nbd+unix:///?socket={}", socket.display());
    let read = succeed(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 7 1M 70k", &disk]));
    assert!(!read.contains("Pattern verification failed"), "{read}");
    assert!(server.wait().unwrap().success());
}

#[test]
fn a_qcow2_disk_takes_writes_flushes_and_discards() {
    let _one = alone();
    let dir = folder();
    let image = qcow2(dir.path(), "a.qcow2", "64M");
    let disk = image.display().to_string();
    let ended = Guest::minimal("6.1", "blk", "", &["--cpus", "2", "--disk", &disk]).finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("blk-wrote"), ended.value("blk-read"));
    assert_eq!(ended.value("vda-size"), "131072");
    qemu_img_finds_nothing(&image);
}

#[test]
fn a_raw_disk_and_a_read_only_one() {
    let _one = alone();
    let dir = folder();
    let (a, b) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    succeed(Command::new("truncate").args(["-s", "32M"]).arg(&a));
    succeed(
        Command::new("dd").args(["if=/dev/urandom", "bs=1M", "count=3"]).arg(format!("of={}", b.display())),
    );
    let first = format!("{},format=raw", a.display());
    let second = format!("{},format=raw,readonly=true", b.display());
    let ended =
        Guest::minimal("6.1", "blk,blk-read", "terem.disk=vdb", &["--disk", &first, "--disk", &second])
            .finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("vdb-ro"), "1");
    assert_eq!(ended.value("blk-sha256"), terem_tests::sha256(&b));
}

#[test]
fn what_was_synced_is_there_after_a_kill() {
    let _one = alone();
    let dir = folder();
    let image = ext4(dir.path());
    let disk = image.display().to_string();
    let guest = Guest::minimal("6.1", "sync-and-hang", "terem.token=kept-after-sigkill", &["--disk", &disk]);
    guest.wait_for("TEREM: synced");
    // Let it go on writing for a moment, then cut the power.
    std::thread::sleep(std::time::Duration::from_millis(700));
    guest.kill();
    let check = run(Command::new("qemu-img").arg("check").arg(&image));
    // 0: nothing found; 3: leaked clusters, which a crash may leave; anything else is corruption.
    assert!(matches!(check.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&check.stdout));
    let ended = Guest::minimal("6.1", "read-back", "", &["--disk", &disk]).finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("token"), "kept-after-sigkill");
    // Its journal has been played; the file system is whole.
    let raw = contents(&image);
    succeed(Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&raw));
}

#[test]
fn a_busy_image_names_its_holder_and_an_overlay_reads_its_base() {
    let _one = alone();
    let dir = folder();
    let base = ext4(dir.path());
    let disk = base.display().to_string();
    let guest = Guest::minimal("6.1", "hang", "", &["--disk", &disk]);
    guest.wait_for("TEREM: init");
    let refused = Guest::minimal("6.1", "poweroff", "", &["--disk", &disk]).finish();
    assert_ne!(refused.code, 0);
    assert!(refused.errors.contains(&guest.pid().to_string()), "{}", refused.errors);
    let qemu = run(Command::new("qemu-io").args(["-c", "write 0 4k"]).arg(&base));
    assert!(!qemu.status.success(), "qemu-io wrote to an image that a guest has");
    guest.kill();
    let top = dir.path().join("top.qcow2");
    succeed(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(&base)
            .arg(&top),
    );
    let before = terem_tests::sha256(&base);
    let ended = Guest::minimal("6.1", "blk-read", "", &["--disk", &top.display().to_string()]).finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("blk-sha256"), terem_tests::sha256(&contents(&base)));
    assert_eq!(terem_tests::sha256(&base), before, "the base was not touched");
}

#[test]
fn an_encrypted_disk_with_limits_is_a_disk() {
    let _one = alone();
    let dir = folder();
    let (image, key) = (dir.path().join("a.luks"), dir.path().join("key"));
    std::fs::write(&key, "not on the command line").unwrap();
    let (new, known) = (format!("file:{}", key.display()), format!("--passphrase=file:{}", key.display()));
    succeed(
        Command::new(terem())
            .args(["disk", "create", "--format", "luks", "-o", "iter-time=10", "--new-passphrase", &new])
            .arg(&image)
            .arg("64M"),
    );
    let disk = format!(
        "{},format=luks,passphrase={new},bps=64M,iops-read=5000,iops-write=5000,iops-size=64K",
        image.display()
    );
    let ended = Guest::minimal("6.1", "blk", "", &["--cpus", "2", "--disk", &disk]).finish();
    // A hole of an encrypted image reads as what zeroes decrypt to, which a disk may do with what was discarded.
    let failed: Vec<&str> = ended.console.lines().filter(|l| l.contains("TEREM: FAIL")).collect();
    assert_eq!(failed, ["TEREM: FAIL the discarded range does not read as zeros"], "{}", ended.console);
    assert_eq!(ended.code, 0);
    assert_eq!(ended.value("blk-wrote"), ended.value("blk-read"));
    assert_eq!(ended.value("vda-size"), "131072");
    // What the guest wrote is what the passphrase opens.
    let raw = dir.path().join("a.raw");
    succeed(Command::new(terem()).args(["disk", "convert", "--to", "raw", &known]).args([&image, &raw]));
    assert!(
        std::fs::read(&raw).unwrap().chunks(4096).filter(|part| part.iter().any(|&b| b != 0)).count() > 100
    );
}
