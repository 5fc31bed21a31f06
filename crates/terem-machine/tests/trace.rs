//! What a trace of a tiny guest says, line by line. The guest is in assembler and needs `nasm`; without it nothing is
//! tested.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::Path;
use std::process::Command;

use terem_config::{ByteSize, MachineConfig, NetConfig, NetKind, TraceConfig, TraceWhat};
use terem_machine::plan::{HostInventory, Plan};
use terem_machine::{Lent, Machine, Outcome};

/// A multiboot image whose code is at 201000h.
const SOURCE: &str = "
bits 32
org 0x200000
header: dd 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), header, 0x200000, 0, 0, main
times 0x1000-($-$$) db 0x90
main:   mov eax, 0x41           ; 201000h
        mov dx, 0x3f8           ; 201005h
        out dx, al              ; 201009h
        mov dx, 0x2f0           ; 20100ah
        in ax, dx               ; 20100eh
        lidt [idtr]             ; 201010h
        int3                    ; 201017h
        mov eax, [0xfee00030]   ; 201018h
        ud2                     ; 20101dh
        mov dx, 0x604           ; 20101fh
        mov ax, 7 << 10 | 1 << 13
        out dx, ax              ; 201027h
        jmp $                   ; 201029h
times 0x1040-($-$$) db 0x90
back:   iret                    ; 201040h
skip:   add dword [esp], 2      ; 201041h
        iret
times 0x1080-($-$$) db 0x90
idt:    times 3 dq 0
        dw back - $$, 0x10, 0x8e00, 0x20
        times 2 dq 0
        dw skip - $$, 0x10, 0x8e00, 0x20
idtr:   dw idtr - idt - 1
        dd idt
";

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn each_line_is_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    std::fs::write(file("guest.asm"), SOURCE).unwrap();
    let nasm =
        Command::new("nasm").args(["-f", "bin", "-o"]).arg(file("guest")).arg(file("guest.asm")).output();
    let Ok(out) = nasm else { return eprintln!("no nasm here: not tested") };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let trace = |what, name: &str| TraceConfig { what, file: Some(file(name)) };
    let config = MachineConfig {
        name: Some("test".into()),
        kernel: Some(file("guest")),
        memory: ByteSize::mib(16),
        nets: vec![NetConfig { kind: Some(NetKind::None), ..NetConfig::default() }],
        traces: vec![
            trace(TraceWhat::Instructions, "instructions"),
            trace(TraceWhat::Exits, "both"),
            trace(TraceWhat::Interrupts, "both"),
        ],
        ..MachineConfig::default()
    };
    let plan = Plan::new(&config, &HostInventory::here()).unwrap();
    assert_eq!(Machine::build(plan, Lent::default()).unwrap().run(), Outcome::PoweredOff);
    let instructions = [
        "201000 mov eax,41h",
        "201005 mov dx,3F8h",
        "201009 out dx,al",
        "20100a mov dx,2F0h",
        "20100e in ax,dx",
        "201010 lidt [2010B8h]",
        "201017 int3",
        "201040 iretd",
        "201018 mov eax,[0FEE00030h]",
        "20101d ud2",
        "201041 add dword ptr [esp],2h",
        "201045 iretd",
        "20101f mov dx,604h",
        "201023 mov ax,3C00h",
        "201027 out dx,ax",
    ];
    let expected: String = instructions.iter().map(|line| format!("0 0010:0000000000{line}\n")).collect();
    let found = text(&file("instructions"));
    assert!(found.starts_with(&expected), "{found}\nexpected\n{expected}");
    assert!(found[expected.len()..].lines().all(|l| l.ends_with("jmp 201029h")), "{found}");
    let both = [
        "201009 out 0x3f8 size 1 value 0x41",
        "20100e in 0x2f0 size 2 value 0xffff",
        "201017 int 0x03",
        "201018 mmio read 0xfee00030 size 4 value 0x50014",
        "20101d exception 0x06 #UD",
        "201027 out 0x604 size 2 value 0x3c00",
    ];
    let expected: String = both.iter().map(|line| format!("0 0010:0000000000{line}\n")).collect();
    assert_eq!(text(&file("both")), expected);
}

#[test]
fn a_trace_that_cannot_be_written_is_told_before_the_guest_runs() {
    let config = MachineConfig {
        kernel: Some("/bin/true".into()),
        traces: vec![TraceConfig { what: TraceWhat::Exits, file: Some("/nowhere/trace".into()) }],
        ..MachineConfig::default()
    };
    let plan = Plan::new(&config, &HostInventory::here()).unwrap();
    let error = Machine::build(plan, Lent::default()).unwrap_err().to_string();
    assert!(error.contains("/nowhere/trace"), "{error}");
}
