//! A client of `--gdb` that sends anything: packets, broken packets, bytes in between.
//!
//! One machine is served for all inputs: its guest waits for ever, so it costs nothing. An input is one connection; whatever
//! it was, the machine lives on (but for a kill, which is obeyed, and after which there is a new one), and the next client
//! is answered.

#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use terem_config::{ByteSize, CpusConfig, GdbAddress, GdbConfig, MachineConfig, NetConfig, NetKind};
use terem_machine::plan::{HostInventory, Plan};
use terem_machine::{Lent, Machine, MachineHandle, Phase};

/// Long enough for any answer on a busy host.
const PATIENCE: Duration = Duration::from_secs(8);
/// A multiboot image: its header, then at 200020h `hlt; jmp $-1`, for both vCPUs.
const HEADER: [u32; 8] = [0x1bad_b002, 0x1_0000, 0xe451_4ffe, 0x20_0000, 0x20_0000, 0, 0, 0x20_0020];
const CODE: [u8; 3] = [0xf4, 0xeb, 0xfd];

struct Served {
    handle: MachineHandle,
    socket: PathBuf,
}

impl Served {
    fn new() -> Self {
        static MACHINES: AtomicU32 = AtomicU32::new(0);
        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("terem-fuzz-gdb-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (kernel, socket) = (dir.join("guest"), dir.join(format!("gdb-{number}")));
        let mut image: Vec<u8> = HEADER.iter().flat_map(|w| w.to_le_bytes()).collect();
        image.extend(CODE);
        std::fs::write(&kernel, image).unwrap();
        let config = MachineConfig {
            name: Some("fuzz".into()),
            kernel: Some(kernel),
            memory: ByteSize::mib(4),
            cpus: CpusConfig::new(2),
            nets: vec![NetConfig { kind: Some(NetKind::None), ..NetConfig::default() }],
            gdb: Some(GdbConfig { listen: GdbAddress::Unix(socket.clone()), wait: false }),
            ..MachineConfig::default()
        };
        let plan = Plan::new(&config, &HostInventory::here()).unwrap();
        let mut machine = Machine::build(plan, Lent::default()).unwrap();
        let handle = machine.handle();
        std::thread::spawn(move || machine.run());
        Self { handle, socket }
    }

    fn ended(&self) -> bool {
        self.handle.status().phase == Phase::Ended
    }

    fn connect(&self) -> Option<UnixStream> {
        let stream = UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        Some(stream)
    }

    /// Sends `bytes`, reads what comes back until the machine hangs up.
    fn play(&self, bytes: &[u8]) {
        let Some(mut stream) = self.connect() else { return };
        if let Ok(mut reader) = stream.try_clone() {
            let answers = std::thread::spawn(move || {
                let mut all = Vec::new();
                reader.read_to_end(&mut all).map(|_| all)
            });
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let answers = answers.join().unwrap();
            assert!(!answers.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock), "no hang-up");
        }
    }
}

/// A packet with its sum.
fn packet(text: &[u8]) -> Vec<u8> {
    let sum = text.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b));
    [b"$", text, format!("#{sum:02x}").as_bytes()].concat()
}

/// Lines are packets, except for those that begin with `!`, which are sent as they are.
fn words(input: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for line in input.split(|b| *b == b'\n') {
        match line.strip_prefix(b"!") {
            Some(raw) => out.extend(raw),
            None => out.extend(packet(line)),
        }
    }
    out
}

thread_local!(static SERVED: RefCell<Option<Served>> = const { RefCell::new(None) });

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    SERVED.with_borrow_mut(|served| {
        let machine = served.get_or_insert_with(Served::new);
        machine.play(&words(input));
        // A kill is obeyed, and so is what a client makes the guest do.
        if machine.ended() {
            *served = None;
            return;
        }
        let Some(mut stream) = machine.connect() else { panic!("nobody listens any more") };
        let _ = stream.write_all(&packet(b"?"));
        let mut answer = [0; 5];
        let read = stream.read_exact(&mut answer);
        assert!(machine.ended() || read.is_ok_and(|()| answer.starts_with(b"+$T")), "{answer:?}");
    });
});
