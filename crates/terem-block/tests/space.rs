//! A full disk: the request that finds no space fails, everything else goes on.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::path::Path;
use std::process::Command;

use peer::{Scratch, assert_clean, options, str};
use terem_block::{AioEngine, CreateOptions, Disk, Format, IoError, Op, Qcow2Options};

const PIECE: usize = 100_000;

/// Not a test by itself: runs with a limit on the size of files.
#[test]
#[ignore = "run by the other test as a process of its own"]
fn child() {
    let Ok(image) = std::env::var("TEREM_TEST_IMAGE") else { return };
    for aio in [AioEngine::Auto, AioEngine::Threads] {
        let disk = Disk::open(&image, &options(aio)).expect("opened");
        let mut failed = 0;
        for i in 0..40u64 {
            match peer::write(&disk, i * PIECE as u64, &[i as u8 + 1; PIECE]) {
                Ok(()) => assert_eq!(
                    peer::read(&disk, i * PIECE as u64, PIECE).expect("read"),
                    [i as u8 + 1; PIECE]
                ),
                Err(e) => {
                    assert_eq!(e, IoError::NoSpace, "request {i}");
                    failed += 1;
                }
            }
        }
        assert!(failed > 5 && failed < 35, "{failed} of 40 failed");
        // What has its place can be written and made durable, and space that is given back used again.
        peer::write(&disk, 0, &[0xcc; PIECE]).expect("written in place");
        disk.run(Op::Flush).expect("flushed");
        disk.run(Op::Discard { offset: 0, length: 10 << 16 }).expect("discarded");
        disk.run(Op::Flush).expect("flushed");
        peer::write(&disk, 60 << 16, &[0xdd; 5 << 16]).expect("written where others were");
        peer::write(&disk, 0, &[0xcc; 1 << 16]).expect("written again");
        disk.run(Op::Discard { offset: 60 << 16, length: 5 << 16 }).expect("discarded");
        disk.close().expect("closed");
    }
}

fn limited(image: &Path, kib: u64) {
    let me = std::env::current_exe().expect("known");
    let script =
        format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" --exact child --ignored --nocapture", kib * 2);
    let out = Command::new("sh")
        .args(["-c", &script, str(&me)])
        .env("TEREM_TEST_IMAGE", image)
        .output()
        .expect("started");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn no_space_fails_one_request_only() {
    let scratch = Scratch::new();
    for cluster_size in [512, 65536] {
        let image = scratch.path("full.qcow2");
        let options = CreateOptions {
            qcow2: Qcow2Options { cluster_size, ..Qcow2Options::default() },
            overwrite: true,
            ..CreateOptions::new(Format::Qcow2, 8 << 20)
        };
        terem_block::create(&image, &options).expect("made");
        limited(&image, 2048);
        assert_clean(&image);
        let disk = Disk::open(&image, &peer::options(AioEngine::Auto)).expect("opened");
        assert_eq!(peer::read(&disk, 0, 1 << 16).expect("read"), vec![0xcc; 1 << 16]);
        // With space again all can be written.
        for i in 0..40u64 {
            peer::write(&disk, i * PIECE as u64, &[i as u8 + 1; PIECE]).expect("written");
        }
        drop(disk);
        assert_clean(&image);
    }
}
