//! gdb on a whole machine: the protocol by hand, gdb itself, clients that go away or talk nonsense.
//! The guests are in assembler and need `nasm`; the tests with gdb need `gdb`. Without them nothing is tested.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is how a test fails, also in what the tests share"
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use terem_config::{
    ByteSize, CpuConfig, CpusConfig, GdbAddress, GdbConfig, MachineConfig, NetConfig, NetKind,
};
use terem_machine::plan::{HostInventory, Plan};
use terem_machine::{Lent, Machine, MachineHandle, Outcome, Phase};

/// Long enough for the slowest test machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A multiboot image whose code is at 201000h. It counts down, writes to 300000h, reads there, and switches itself off;
/// or, with 1 at 300010h, counts at 300020h for ever.
const SOURCE: &str = "
bits 32
org 0x200000
header: dd 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), header, 0x200000, 0, 0, main
times 0x1000-($-$$) db 0x90
main:   mov ebx, 0x11                   ; 201000h
        mov ecx, 100000                 ; 201005h
again:  add eax, ecx                    ; 20100ah
        dec ecx
        jnz again
        mov dword [0x300000], 0x12345678 ; 20100fh
        nop                             ; 201019h
        mov edx, [0x300000]             ; 20101ah
        nop                             ; 201020h
        cmp dword [0x300010], 1
        jne off
count:  inc dword [0x300020]            ; 20102ah
        jmp count
off:    mov dx, 0x604
        mov ax, 7 << 10 | 1 << 13
        out dx, ax
        jmp $
";
/// The same image with code that uses AVX, where there is one: it puts the lower half of YMM3 into the upper one of YMM2
/// and the upper half into XMM1, which goes to 300040h.
const AVX_SOURCE: &str = "
bits 32
org 0x200000
header: dd 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), header, 0x200000, 0, 0, main
times 0x1000-($-$$) db 0x90
main:   mov eax, cr4
        or eax, 1 << 9 | 1 << 10 | 1 << 18
        mov cr4, eax
        xor ecx, ecx
        xor edx, edx
        mov eax, 7
        xsetbv
        vxorps ymm3, ymm3, ymm3
        nop                             ; 20101bh
        vinsertf128 ymm2, ymm3, xmm3, 1
        vextractf128 xmm1, ymm3, 1
        vmovups [0x300040], xmm1
        nop                             ; 201030h
off:    mov dx, 0x604
        mov ax, 7 << 10 | 1 << 13
        out dx, ax
        jmp $
";
const MAIN: u64 = 0x20_1000;
const LOOP: u64 = 0x20_100a;
const STORE: u64 = 0x20_100f;
const COUNT: u64 = 0x20_102a;

struct Guest {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    handle: MachineHandle,
    thread: JoinHandle<Outcome>,
}

impl Guest {
    fn start(wait: bool, cpus: u32) -> Option<Self> {
        Self::of(SOURCE, "default", cpus, wait)
    }

    fn of(program: &str, model: &str, cpus: u32, wait: bool) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (source, kernel) = (dir.path().join("guest.asm"), dir.path().join("guest"));
        std::fs::write(&source, program).unwrap();
        let Ok(out) = Command::new("nasm").args(["-f", "bin", "-o"]).arg(&kernel).arg(&source).output()
        else {
            eprintln!("no nasm here: not tested");
            return None;
        };
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let socket = dir.path().join("gdb");
        let config = MachineConfig {
            name: Some("test".into()),
            kernel: Some(kernel),
            memory: ByteSize::mib(16),
            cpus: CpusConfig::new(cpus),
            cpu: CpuConfig { model: model.into(), ..CpuConfig::default() },
            nets: vec![NetConfig { kind: Some(NetKind::None), ..NetConfig::default() }],
            gdb: Some(GdbConfig { listen: GdbAddress::Unix(socket.clone()), wait }),
            ..MachineConfig::default()
        };
        let plan = Plan::new(&config, &HostInventory::here()).unwrap();
        let mut machine = Machine::build(plan, Lent::default()).unwrap();
        let handle = machine.handle();
        let thread = std::thread::spawn(move || machine.run());
        let guest = Self { _dir: dir, socket, handle, thread };
        guest.until(|g| g.handle.status().phase != Phase::Built);
        Some(guest)
    }

    fn until(&self, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < end, "{:?}", self.handle.status());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { stream }
    }

    fn end(self) -> Outcome {
        self.until(|g| g.thread.is_finished());
        self.thread.join().unwrap()
    }

    /// Runs gdb with these commands; what it printed.
    fn gdb(&self, commands: &[&str]) -> Option<String> {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-batch", "-ex", "set pagination off", "-ex", "set confirm off"]);
        gdb.arg("-ex").arg(format!("target remote {}", self.socket.display()));
        for command in commands {
            gdb.args(["-ex", command]);
        }
        let Ok(out) = gdb.output() else {
            eprintln!("no gdb here: not tested");
            let _ = self.handle.stop(None);
            return None;
        };
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        Some(format!("{}\n--- errors:\n{}", text(&out.stdout), text(&out.stderr)))
    }
}

/// A client that speaks the protocol by hand.
struct Client {
    stream: UnixStream,
}

impl Client {
    fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        self.stream.write_all(format!("${packet}#{sum:02x}").as_bytes()).unwrap();
    }

    /// The next packet's text, acknowledged. Run lengths are left as they are.
    fn receive(&mut self) -> String {
        let (mut text, mut byte) = (Vec::new(), [0]);
        while byte[0] != b'$' {
            self.stream.read_exact(&mut byte).unwrap();
        }
        loop {
            self.stream.read_exact(&mut byte).unwrap();
            if byte[0] == b'#' {
                break;
            }
            text.push(byte[0]);
        }
        self.stream.read_exact(&mut [0; 2]).unwrap();
        let _ = self.stream.write_all(b"+");
        String::from_utf8(text).unwrap()
    }

    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive()
    }
}

#[test]
fn gdb_breaks_steps_watches_and_changes() {
    let Some(guest) = Guest::start(true, 2) else { return };
    assert_eq!(guest.handle.status().phase, Phase::Paused, "it waits");
    let Some(text) = guest.gdb(&[
        "info threads",
        "printf \"first at %lx\\n\", $rip",
        "break *0x201005",
        "continue",
        "printf \"1: rip %lx rbx %lx cs %x cr0 %lx\\n\", $rip, $rbx, $cs, $cr0 & 1",
        "stepi",
        "printf \"2: rip %lx rcx %lx\\n\", $rip, $rcx",
        "hbreak *0x20100f",
        "continue",
        "printf \"3: rip %lx rcx %lx\\n\", $rip, $rcx",
        "delete",
        "watch *(int*)0x300000",
        "continue",
        "printf \"4: rip %lx\\n\", $rip",
        "delete",
        "rwatch *(int*)0x300000",
        "continue",
        "printf \"5: rip %lx rdx %lx\\n\", $rip, $rdx",
        "delete",
        "set var $rdx = 0x77",
        "set var $xmm3.v2_int64[1] = 5",
        "set var {int}0x300030 = 0x1234abcd",
        "printf \"6: rdx %lx memory %x xmm3 %lx fctrl %x\\n\", $rdx, {int}0x300030, $xmm3.v2_int64[1], $fctrl",
        "print $eflags",
        "monitor physical 0x300030 4",
        "x/i $rip",
        "continue",
    ]) else {
        return;
    };
    let wanted = [
        "vCPU 0 [running]",
        "vCPU 1 [waits to be started]",
        "first at 201000",
        "1: rip 201005 rbx 11 cs 10 cr0 1",
        "2: rip 20100a rcx 186a0",
        "3: rip 20100f rcx 0",
        "Old value = 0\nNew value = 305419896",
        "4: rip 201019",
        "Value = 305419896",
        "5: rip 201020 rdx 12345678",
        "6: rdx 77 memory 1234abcd xmm3 5 fctrl 37f",
        "ZF",
        "=> 0x201020:\tnop",
        "[Inferior 1 (process 1) exited normally]",
    ];
    let mut rest = text.as_str();
    for line in wanted {
        let at = rest.find(line).unwrap_or_else(|| panic!("no {line:?} (in this place) in:\n{text}"));
        rest = &rest[at + line.len()..];
    }
    assert!(text.contains("0x300030: cd ab 34 12"), "what monitor says:\n{text}");
    assert_eq!(guest.end(), Outcome::PoweredOff);
}

#[test]
fn gdb_sees_and_changes_whole_ymm_registers() {
    if !is_x86_feature_detected!("avx2") {
        eprintln!("no AVX here: not tested");
        return;
    }
    let Some(guest) = Guest::of(AVX_SOURCE, "max", 1, true) else { return };
    let Some(text) = guest.gdb(&[
        "break *0x20101b",
        "break *0x201030",
        "continue",
        "set var $ymm3.v4_int64[0] = 0x1111",
        "set var $ymm3.v4_int64[2] = 0x1122334455667788",
        "set var $ymm3.v4_int64[3] = 0x99",
        "set var $mxcsr = 0x1fa0",
        "printf \"1: %lx %lx\\n\", $ymm3.v4_int64[3], $xmm3.v2_int64[0]",
        "continue",
        "printf \"2: %lx %lx\\n\", $ymm2.v4_int64[0], $ymm2.v4_int64[2]",
        "printf \"3: %lx %lx %x\\n\", {long}0x300040, {long}0x300048, $mxcsr",
        "continue",
    ]) else {
        return;
    };
    for line in ["1: 99 1111", "2: 1111 1111", "3: 1122334455667788 99 1fa0"] {
        assert!(text.contains(line), "no {line:?} in:\n{text}");
    }
    assert_eq!(guest.end(), Outcome::PoweredOff);
}

#[test]
fn gdb_that_detaches_lets_the_machine_go_on() {
    let Some(guest) = Guest::start(true, 1) else { return };
    // The breakpoint is left behind; the machine does not know it any more.
    let Some(text) = guest.gdb(&["break *0x201005", "detach"]) else { return };
    assert!(text.contains("detached"), "{text}");
    assert_eq!(guest.end(), Outcome::PoweredOff);
}

#[test]
fn a_machine_that_waits_goes_on_only_for_gdb() {
    let Some(guest) = Guest::start(true, 1) else { return };
    let refused = guest.handle.resume().unwrap_err().to_string();
    assert!(refused.contains("gdb"), "{refused}");
    // Who only connects changes nothing.
    drop(guest.connect());
    let mut client = guest.connect();
    assert!(client.ask("?").starts_with("T05thread:"));
    assert_eq!(client.ask("qAttached"), "1", "quitting gdb detaches");
    assert_eq!(client.ask(&format!("Z0,{MAIN:x},1")), "OK");
    let stop = client.ask("vCont;c");
    assert!(stop.starts_with("T05thread:") && stop.contains("swbreak"), "{stop}");
    assert_eq!(guest.handle.status().phase, Phase::Paused);
    // It goes away in the middle: the machine goes on, past its breakpoint.
    drop(client);
    assert_eq!(guest.end(), Outcome::PoweredOff);
}

#[test]
fn a_running_machine_is_interrupted_stepped_and_killed() {
    let Some(guest) = Guest::start(true, 1) else { return };
    let mut client = guest.connect();
    assert_eq!(client.ask("M300010,4:01000000"), "OK");
    // To where it counts.
    assert_eq!(client.ask(&format!("Z0,{COUNT:x},1")), "OK");
    assert!(client.ask("vCont;c").contains("swbreak"));
    assert_eq!(client.ask(&format!("z0,{COUNT:x},1")), "OK");
    client.send("vCont;c");
    guest.until(|g| g.handle.status().phase == Phase::Running);
    // Memory of a running machine is not read.
    let busy = client.ask("m300020,4");
    assert!(busy.starts_with('E'), "{busy}");
    client.stream.write_all(&[3]).unwrap();
    let stop = client.receive();
    assert!(stop.starts_with("T02thread:"), "{stop}");
    let first = client.ask("m300020,4");
    let step = client.ask("vCont;s:1");
    assert!(step.starts_with("T05thread:"), "{step}");
    client.ask("vCont;s:1");
    assert_ne!(client.ask("m300020,4"), first, "one of two instructions counts");
    assert_eq!(client.ask("m300020,4"), client.ask("m300020,4"), "it stands still");
    // A hundred steps from here lead to no other place.
    for _ in 0..100 {
        client.ask("vCont;s:1");
    }
    assert!(client.ask("mffffffff00000000,4").len() <= 8, "32 bits of address wrap around");
    assert!(client.ask("m8000000,4").starts_with('E'), "no RAM");
    assert_eq!(client.ask("Z2,300020,10"), "E16", "longer than a watchpoint can be");
    client.send("k");
    assert_eq!(guest.end(), Outcome::Stopped);
}

#[test]
fn a_machine_can_be_stopped_under_a_debugger() {
    let Some(guest) = Guest::start(true, 1) else { return };
    let mut client = guest.connect();
    assert!(client.ask("?").starts_with("T05"));
    guest.handle.stop(None).unwrap();
    assert_eq!(guest.end(), Outcome::Stopped);
}

#[test]
fn a_reset_keeps_breakpoints() {
    let Some(guest) = Guest::start(true, 1) else { return };
    let mut client = guest.connect();
    assert_eq!(client.ask(&format!("Z1,{STORE:x},1")), "OK");
    assert!(client.ask("vCont;c").contains("hwbreak"));
    guest.handle.reset().unwrap();
    assert_eq!(guest.handle.status().phase, Phase::Paused, "gdb still holds it");
    assert!(client.ask("vCont;c").contains("hwbreak"));
    assert_eq!(client.ask(&format!("z1,{STORE:x},1")), "OK");
    client.send("vCont;c");
    assert!(client.receive().starts_with('W'));
    assert_eq!(guest.end(), Outcome::PoweredOff);
}

/// A number that looks random.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

#[test]
fn nonsense_harms_nobody() {
    let Some(guest) = Guest::start(true, 1) else { return };
    let mut client = guest.connect();
    assert_eq!(client.ask("M300010,4:01000000"), "OK");
    drop(client);
    const WORDS: [&str; 24] = [
        "g",
        "G00",
        "m0,ffffffff",
        "m,",
        "M0,4:zz",
        "Z0,0,0",
        "Z2,ffffffffffffffff,8",
        "Z4,0,ffffffffffffffff",
        "z9,1,1",
        "vCont;s:99",
        "vCont;c:0",
        "vCont;",
        "vCont?",
        "qSupported:;;=",
        "qXfer:features:read:target.xml:ffffffff,ffffffff",
        "qRcmd,zz",
        "qRcmd,706879736963616c2030",
        "Hg-1",
        "Hgffffffffff",
        "Tffffff",
        "p999",
        "P10=0",
        "X0,8:}}",
        "?",
    ];
    let mut seed = 1;
    for round in 0..200 {
        let mut client = guest.connect();
        client.stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        for _ in 0..next(&mut seed) % 20 {
            let mut bytes = match next(&mut seed) % 3 {
                0 => (0..next(&mut seed) % 64)
                    .map(|_| (next(&mut seed) % 256).to_le_bytes()[0])
                    .collect::<Vec<u8>>(),
                1 => b"$#$}\x03+-***#00".to_vec(),
                _ => {
                    let word = WORDS[usize::try_from(next(&mut seed)).unwrap() % WORDS.len()];
                    let sum = word.bytes().fold(0_u8, u8::wrapping_add);
                    format!("${word}#{sum:02x}").into_bytes()
                }
            };
            // A kill would be obeyed.
            bytes.iter_mut().filter(|b| **b == b'k').for_each(|b| *b = b'j');
            if client.stream.write_all(&bytes).is_err() {
                break;
            }
            let _ = client.stream.read(&mut [0; 256]);
        }
        drop(client);
        assert_ne!(guest.handle.status().phase, Phase::Ended, "round {round}");
    }
    // A long word without an end.
    let mut client = guest.connect();
    let _ = client.stream.write_all(&vec![b'$'; 1 << 16]);
    drop(client);
    // The next one is served as ever, and finds the guest counting.
    let mut client = guest.connect();
    assert!(client.ask("?").starts_with("T05"));
    assert_eq!(client.ask(&format!("Z0,{LOOP:x},1")), "OK");
    drop(client);
    guest.until(|g| g.handle.status().phase == Phase::Running);
    guest.handle.stop(None).unwrap();
    assert_eq!(guest.end(), Outcome::Stopped);
}
