//! Small guests in assembler on a whole machine with the software CPU: boot, devices, power-off, reset, triple
//! fault, pause, save and restore. They need `nasm`; without it nothing is tested.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is how a test fails, also in what the tests share"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use terem_config::{ByteSize, CpusConfig, MachineConfig, NetConfig, NetKind};
use terem_devices::chipset::uart::CharBackend;
use terem_machine::plan::{HostInventory, Plan};
use terem_machine::{Event, Lent, Machine, MachineHandle, Outcome, Phase};

/// Long enough for the slowest test machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A multiboot image at 2 MiB that starts at `start`, with macros for what the guests below do.
const PRELUDE: &str = "
bits 32
org 0x200000
%define SEEN 0x300000
header: dd 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), header, 0x200000, 0, 0, start
%macro print 1
        mov esi, %%text
        call puts
        jmp %%over
%%text: db %1, 0
%%over:
%endmacro
%macro power_off 0
        mov dx, 0x604
        mov ax, 7 << 10 | 1 << 13
        out dx, ax
        jmp $
%endmacro
puts:   lodsb
        test al, al
        jz .end
        mov dx, 0x3f8
        out dx, al
        jmp puts
.end:   ret
; waits for a byte from COM1
getc:   mov dx, 0x3fd
.wait:  in al, dx
        test al, 1
        jz .wait
        mov dx, 0x3f8
        in al, dx
        ret
start:
";

struct Screen(Sender<u8>);

impl CharBackend for Screen {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            let _ = self.0.send(*b);
        }
    }
}

struct Guest {
    dir: tempfile::TempDir,
    config: MachineConfig,
}

/// A machine that runs.
struct Running {
    handle: MachineHandle,
    screen: Receiver<u8>,
    events: Receiver<Event>,
    thread: JoinHandle<Outcome>,
}

impl Guest {
    fn new(body: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (source, kernel) = (dir.path().join("guest.asm"), dir.path().join("guest"));
        std::fs::write(&source, format!("{PRELUDE}{body}")).unwrap();
        let Ok(out) = Command::new("nasm").args(["-f", "bin", "-o"]).arg(&kernel).arg(&source).output()
        else {
            eprintln!("no nasm here: not tested");
            return None;
        };
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let config = MachineConfig {
            name: Some("test".into()),
            kernel: Some(kernel),
            memory: ByteSize::mib(16),
            nets: vec![NetConfig { kind: Some(NetKind::None), ..NetConfig::default() }],
            ..MachineConfig::default()
        };
        Some(Self { dir, config })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self, from: Option<&Path>) -> Running {
        let plan = Plan::new(&self.config, &HostInventory::here()).unwrap();
        let (sender, screen) = channel();
        let mut machine =
            Machine::build(plan, Lent { stdio: Some(Box::new(Screen(sender))), ..Lent::default() }).unwrap();
        if let Some(dir) = from {
            machine.restore(dir).unwrap();
        }
        let (handle, events) = (machine.handle(), machine.handle().subscribe());
        Running { handle, screen, events, thread: std::thread::spawn(move || machine.run()) }
    }

    fn run(&self) -> (Outcome, String) {
        self.start(None).end()
    }
}

impl Running {
    fn end(self) -> (Outcome, String) {
        let end = Instant::now() + PATIENCE;
        while !self.thread.is_finished() {
            if Instant::now() > end {
                let screen: Vec<u8> = self.screen.try_iter().collect();
                panic!("the guest does not end: {:?}", String::from_utf8_lossy(&screen));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let outcome = self.thread.join().unwrap();
        assert_eq!(self.handle.status().phase, Phase::Ended);
        assert!(self.handle.pause().is_err(), "nobody answers any more");
        (outcome, String::from_utf8(self.screen.try_iter().collect()).unwrap())
    }

    fn wait_for(&self, text: &str) {
        let mut seen = String::new();
        while !seen.ends_with(text) {
            let byte = self.screen.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{seen:?}: {e}"));
            seen.push(char::from(byte));
        }
    }
}

#[test]
fn a_guest_prints_finds_pci_by_ecam_and_powers_off() {
    let Some(guest) = Guest::new(
        "
        cmp eax, 0x2badb002
        jne .wrong
        cmp dword [0xb0000000], 0x29c08086    ; 00.0
        jne .wrong
        cmp dword [0xb00f8000], 0x29188086    ; 1f.0
        jne .wrong
        cmp dword [0xb0008000], 0x10441af4    ; 01.0: virtio-rng
        jne .wrong
        test dword [0xb0008004], 2            ; its memory is switched on
        jz .wrong
        print 'Hello'
        power_off
.wrong: print 'wrong'
        power_off
        ",
    ) else {
        return;
    };
    assert_eq!(guest.run(), (Outcome::PoweredOff, "Hello".into()));
}

#[test]
fn a_reset_begins_anew_and_memory_stays() {
    let Some(mut guest) = Guest::new(
        "
        print 'x'
        inc dword [SEEN]
        cmp dword [SEEN], 3
        je .last
        cmp dword [SEEN], 2
        je .keyboard
        mov dx, 0xcf9
        mov al, 6
        out dx, al
        jmp $
.keyboard:
        mov al, 0xfe
        out 0x64, al
        jmp $
.last:  power_off
        ",
    ) else {
        return;
    };
    let running = guest.start(None);
    let handle = running.handle.clone();
    assert_eq!(running.end(), (Outcome::PoweredOff, "xxx".into()));
    assert_eq!(handle.status().resets, 2);
    guest.config.no_reboot = true;
    assert_eq!(guest.run(), (Outcome::Reset, "x".into()));
}

#[test]
fn a_triple_fault_resets_or_ends_with_the_registers() {
    let Some(mut guest) = Guest::new(
        "
        inc dword [SEEN]
        cmp dword [SEEN], 2
        je .again
        mov ebx, 0x12345678
        lidt [.none]
        int3
.none:  dw 0, 0, 0
.again: print 'again'
        power_off
        ",
    ) else {
        return;
    };
    assert_eq!(guest.run(), (Outcome::PoweredOff, "again".into()));
    guest.config.no_reboot = true;
    let (Outcome::TripleFault(fault), _) = guest.run() else { panic!("no triple fault") };
    assert_eq!((fault.vcpu, fault.state.gpr[3]), (0, 0x1234_5678));
    assert!(fault.to_string().contains("rbx 0000000012345678"), "{fault}");
}

#[test]
fn debug_exit_and_panic_end_the_machine() {
    let Some(guest) = Guest::new("mov dx, 0x501\n mov al, 0x2a\n out dx, al\n jmp $") else { return };
    assert_eq!(guest.run().0, Outcome::DebugExit(0x2a));
    let guest = Guest::new("mov dx, 0x505\n mov al, 1\n out dx, al\n jmp $").unwrap();
    assert_eq!(guest.run().0, Outcome::Panicked);
}

#[test]
fn a_guest_that_hangs_can_be_paused_and_stopped() {
    for body in ["print 'on'\n jmp $", "print 'on'\n cli\n hlt"] {
        let Some(mut guest) = Guest::new(body) else { return };
        guest.config.cpus = CpusConfig::new(2);
        let running = guest.start(None);
        running.wait_for("on");
        let h = &running.handle;
        h.pause().unwrap();
        let then = h.status();
        assert_eq!(then.phase, Phase::Paused);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(h.status(), then, "time stands still");
        h.resume().unwrap();
        let began = Instant::now();
        h.stop(Some(Duration::from_millis(100))).unwrap();
        assert_eq!(running.end().0, Outcome::Stopped);
        assert!(began.elapsed() >= Duration::from_millis(100));
    }
}

#[test]
fn the_power_button_is_a_fixed_event() {
    let Some(guest) = Guest::new(
        "
        mov dx, 0xb2            ; ACPI on
        mov al, 2
        out dx, al
        print 'on'
        mov dx, 0x600
.wait:  in ax, dx
        test ax, 1 << 8
        jz .wait
        power_off
        ",
    ) else {
        return;
    };
    let running = guest.start(None);
    running.wait_for("on");
    running.handle.stop(Some(PATIENCE)).unwrap();
    let events = running.events.recv_timeout(PATIENCE).unwrap();
    assert_eq!(events, Event::Running);
    assert_eq!(running.events.recv_timeout(PATIENCE).unwrap(), Event::PowerButton);
    assert_eq!(running.end().0, Outcome::PoweredOff);
}

#[test]
fn a_saved_machine_goes_on_in_another_process_life() {
    let Some(mut guest) = Guest::new(
        "
        mov dword [SEEN], 'memo'
        mov ebx, 'regs'
        finit
        fldpi
        mov dx, 0x3ff           ; COM1's scratch register
        mov al, 0x5a
        out dx, al
        print 'ready'
        call getc
        push eax
        cmp dword [SEEN], 'memo'
        jne .wrong
        cmp ebx, 'regs'
        jne .wrong
        fldpi
        fcompp
        fnstsw ax
        test ah, 0x40           ; C3: equal
        jz .wrong
        mov dx, 0x3ff
        in al, dx
        cmp al, 0x5a
        jne .wrong
        pop eax
        mov dx, 0x3f8
        out dx, al
        power_off
.wrong: print 'wrong'
        power_off
        ",
    ) else {
        return;
    };
    guest.config.cpus = CpusConfig::new(2);
    let running = guest.start(None);
    running.wait_for("ready");
    let saved = guest.file("saved");
    running.handle.save(saved.clone()).unwrap();
    assert_eq!(running.handle.status().phase, Phase::Running, "it goes on");
    assert_eq!(running.handle.send_input(b"a"), 1);
    assert_eq!(running.end(), (Outcome::PoweredOff, "a".into()));

    let restored = guest.start(Some(&saved));
    let uptime = restored.handle.status().uptime_ms;
    assert!(uptime < 60_000, "{uptime}");
    assert_eq!(restored.handle.send_input(b"b"), 1);
    assert_eq!(restored.end(), (Outcome::PoweredOff, "b".into()));

    guest.config.cpus = CpusConfig::new(1);
    let plan = Plan::new(&guest.config, &HostInventory::here()).unwrap();
    let mut other = Machine::build(plan, Lent::default()).unwrap();
    let error = other.restore(&saved).unwrap_err().to_string();
    assert!(error.contains("another cpus"), "{error}");
}

#[test]
fn inspect_shows_what_is_where() {
    let Some(guest) = Guest::new("print 'on'\n jmp $") else { return };
    let running = guest.start(None);
    running.wait_for("on");
    let all = running.handle.inspect();
    assert_eq!(all["status"]["phase"], "running");
    assert_eq!(all["plan"]["cpus"]["count"], 1);
    let names: Vec<&str> =
        all["ports"].as_array().unwrap().iter().filter_map(|r| r["name"].as_str()).collect();
    assert!(names.contains(&"COM1") && names.contains(&"ACPI PM"), "{names:?}");
    running.handle.stop(None).unwrap();
    assert_eq!(running.end().0, Outcome::Stopped);
}

#[test]
fn what_cannot_be_built_is_told() {
    let Some(mut guest) = Guest::new("hlt") else { return };
    let build = |c: &MachineConfig| {
        Machine::build(Plan::new(c, &HostInventory::here()).unwrap(), Lent::default())
            .unwrap_err()
            .to_string()
    };
    guest.config.disks = vec![terem_config::DiskConfig::new(guest.file("none.qcow2"))];
    assert!(build(&guest.config).contains("none.qcow2"), "{}", build(&guest.config));
    guest.config.kernel = Some(guest.dir.path().into());
    assert!(build(&guest.config).contains("it is a directory"));
}
