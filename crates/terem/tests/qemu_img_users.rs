//! Programs that call qemu-img, with ours in its place: they must not be able to tell.
#![allow(clippy::panic, clippy::unwrap_used)] // Here too a panic is how a test fails, also outside of test functions.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// What OpenStack's services make of `qemu-img info`, by their own module (Debian: python3-oslo.utils).
const OSLO: &str = r"
import subprocess, sys
from oslo_utils import imageutils
for name in sys.argv[1:]:
    text = subprocess.run(['qemu-img', 'info', '--output=json', '--force-share', name],
                          capture_output=True, text=True, check=True).stdout
    info = imageutils.QemuImgInfo(text, format='json')
    print(name, info.file_format, info.virtual_size, info.cluster_size, info.backing_file, info.encrypted,
          [s['name'] for s in info.snapshots], sorted((info.format_specific or {}).get('data', {})))
";

/// A directory in which `qemu-img` is ours.
fn in_place_of_qemu_img() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("qemu-img");
    let text = format!("#!/bin/sh\nexec '{}' qemu-img \"$@\"\n", env!("CARGO_BIN_EXE_terem"));
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Runs a program in `directory`, with ours as qemu-img if `ours` is where it lies; what it prints.
fn run(program: &str, words: &[&str], directory: &Path, ours: Option<&TempDir>) -> String {
    let mut command = Command::new(program);
    if let Some(ours) = ours {
        let mut path = OsString::from(ours.path());
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path);
    }
    let output = command.args(words).current_dir(directory).output();
    let output =
        output.unwrap_or_else(|e| panic!("{program}: {e} (Debian: cloud-image-utils, python3-oslo.utils)"));
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn openstack_reads_what_is_told_of_images() {
    let (ours, images) = (in_place_of_qemu_img(), tempfile::tempdir().unwrap());
    let make = |words: &str| {
        let words: Vec<&str> = words.split_whitespace().collect();
        run("qemu-img", &words, images.path(), Some(&ours));
    };
    make("create -q -f raw raw 3M");
    make("create -q -f qcow2 a.qcow2 3M");
    make("snapshot -c s1 a.qcow2");
    make("create -q -f qcow2 -b a.qcow2 -F qcow2 overlay");
    make("create -q -f qcow2 -o data_file=data.raw outside 3M");
    make("create -q -f luks --object secret,id=s,data=pass -o key-secret=s,iter-time=10 luks 3M");
    for format in ["vmdk", "vdi", "vpc", "vhdx"] {
        make(&format!("convert -O {format} a.qcow2 image.{format}"));
    }
    let names = "raw a.qcow2 overlay outside luks image.vmdk image.vdi image.vpc image.vhdx";
    let mut words = vec!["-W", "ignore", "-c", OSLO];
    words.extend(names.split(' '));
    // Not one of another Python that may come first in PATH.
    let told = |ours| run("/usr/bin/python3", &words, images.path(), ours);
    let (theirs, ours) = (told(None), told(Some(&ours)));
    assert_eq!(theirs, ours);
    assert_eq!(ours.lines().count(), 9, "{ours}");
}

#[test]
fn cloud_localds_makes_seeds() {
    let (ours, directory) = (in_place_of_qemu_img(), tempfile::tempdir().unwrap());
    std::fs::write(directory.path().join("user-data"), "#cloud-config\n").unwrap();
    for format in ["qcow2", "vmdk", "vdi"] {
        let words = ["--disk-format", format, "seed", "user-data"];
        run("cloud-localds", &words, directory.path(), Some(&ours));
        // QEMU reads it: an ISO image with the label that cloud-init looks for.
        run("qemu-img", &["convert", "-f", format, "-O", "raw", "seed", "seed.iso"], directory.path(), None);
        let seed = std::fs::read(directory.path().join("seed.iso")).unwrap();
        assert_eq!(&seed[0x8001..0x8006], b"CD001", "{format}");
        assert_eq!(&seed[0x8028..0x802e], b"cidata", "{format}");
    }
}
