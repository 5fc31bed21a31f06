//! A running Linux is saved, and goes on in another machine.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use terem_config::{ByteSize, CpusConfig, DiskConfig, MachineConfig, NetConfig, NetKind};
use terem_devices::chipset::uart::CharBackend;
use terem_machine::plan::{HostInventory, Plan};
use terem_machine::{Lent, Machine, MachineHandle, Outcome};
use terem_tests::{PATIENCE, cached};

struct Screen(Sender<u8>);

impl CharBackend for Screen {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            let _ = self.0.send(*b);
        }
    }
}

struct Running {
    handle: MachineHandle,
    screen: Receiver<u8>,
    seen: String,
    thread: JoinHandle<Outcome>,
}

fn start(config: &MachineConfig, from: Option<&Path>) -> Running {
    let plan = Plan::new(config, &HostInventory::here()).unwrap();
    let (sender, screen) = channel();
    let mut machine =
        Machine::build(plan, Lent { stdio: Some(Box::new(Screen(sender))), ..Lent::default() }).unwrap();
    if let Some(dir) = from {
        machine.restore(dir).unwrap();
    }
    let handle = machine.handle();
    Running { handle, screen, seen: String::new(), thread: std::thread::spawn(move || machine.run()) }
}

impl Running {
    fn wait_for(&mut self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            let byte = self.screen.recv_timeout(end.saturating_duration_since(Instant::now()));
            self.seen.push(char::from(byte.unwrap_or_else(|e| panic!("{text:?}: {e}:\n{}", self.seen))));
        }
    }

    fn end(mut self) -> (Outcome, String) {
        let end = Instant::now() + PATIENCE;
        while !self.thread.is_finished() {
            assert!(Instant::now() < end, "the guest does not end:\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        }
        self.seen.extend(self.screen.try_iter().map(char::from));
        (self.thread.join().unwrap(), self.seen)
    }
}

#[test]
fn a_saved_linux_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let bytes: Vec<u8> = (0..2_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&disk, bytes).unwrap();
    let config: MachineConfig = MachineConfig {
        name: Some("saved".into()),
        cpus: CpusConfig::new(2),
        memory: ByteSize::mib(256),
        kernel: Some(cached("kernel-6.1/vmlinuz")),
        initrd: Some(cached("minimal-6.1/initramfs")),
        cmdline: Some("console=ttyS0 quiet panic=-1 terem.test=ticks terem.ticks=25".into()),
        disks: vec![DiskConfig::new(disk)],
        nets: vec![NetConfig { kind: Some(NetKind::None), ..NetConfig::default() }],
        ..MachineConfig::default()
    };
    let saved = dir.path().join("saved");
    let mut first = start(&config, None);
    first.wait_for("TEREM: tick 5\r\n");
    first.handle.save(saved.clone()).unwrap();
    first.wait_for("TEREM: tick 8\r\n");
    first.handle.stop(None).unwrap();
    let (outcome, _) = first.end();
    assert_eq!(outcome, Outcome::Stopped);

    let mut second = start(&config, Some(&saved));
    // What was printed before the save is not printed again; what comes after it is, by this machine, too.
    second.wait_for("TEREM: tick 8\r\n");
    assert!(!second.seen.contains("tick 4\r\n") && !second.seen.contains("init"), "{}", second.seen);
    let (outcome, seen) = second.end();
    assert_eq!(outcome, Outcome::PoweredOff, "{seen}");
    assert!(seen.contains("TEREM: end ticks") && !seen.contains("FAIL"), "{seen}");
    // Whatever the kernel finds odd about the time that it was away is said there.
    assert!(seen.contains("clocksource tsc"), "{seen}");
}
