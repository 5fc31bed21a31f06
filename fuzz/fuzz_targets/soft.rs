//! Arbitrary code on the software CPU. The input: mode and registers (18 bytes), then instructions in slots of
//! 16 bytes; an exception or interrupt ends a slot, and the next one begins with what the last one left behind.
//!
//! Whatever it does, the CPU stops when it is told to, never gives up, and is in a state that a processor can be in,
//! which a vCPU takes up and gives back unchanged.

#![no_main]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use terem_bus::{Bus, Clock, Handler};
use terem_cpu::{Accelerator, CpuModel, DescriptorTable, Segment, Stop, Topology, Vcpu, VcpuState, rflags};
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, RamRange};
use terem_soft::{SoftAccelerator, SoftConfig};

const RAM: u64 = 1 << 20;
/// Interrupt vectors of real mode, and gates.
const IDT: u64 = 0x0;
const GATES: u64 = 0x1000;
const GDT: u64 = 0x2000;
/// What all vectors lead to.
const STUB: u64 = 0x2800;
const PAGE_TABLES: u64 = 0x3000;
const CODE: u64 = 0x8000;
const STACK: u64 = 0x7ff0;
const SLOT: usize = 16;
/// Slots of an input that are executed.
const SLOTS: usize = 16;
/// How long a slot may go on.
const PATIENCE: Duration = Duration::from_millis(2);

/// Null, 64-bit code, data, 32-bit code.
const DESCRIPTORS: [u64; 4] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff];

type Running = (u64, Option<Arc<SoftAccelerator>>);

/// Stops slots that do not end: a thread that looks at which run is under way.
struct Watchdog {
    running: Mutex<Running>,
    run: AtomicU64,
}

fn locked(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

static WATCHDOG: LazyLock<Arc<Watchdog>> = LazyLock::new(|| {
    let watchdog = Arc::new(Watchdog { running: Mutex::default(), run: AtomicU64::new(0) });
    let own = Arc::clone(&watchdog);
    std::thread::spawn(move || {
        let mut seen = 0;
        loop {
            std::thread::sleep(PATIENCE);
            let running = locked(&own.running);
            if let (run, Some(accelerator)) = &*running
                && *run == seen
            {
                accelerator.kick(0);
            }
            seen = running.0;
        }
    });
    watchdog
});

impl Watchdog {
    fn run(&self, accelerator: &Arc<SoftAccelerator>, vcpu: &mut dyn Vcpu) -> Stop {
        let run = self.run.fetch_add(1, Ordering::Relaxed) + 1;
        *locked(&self.running) = (run, Some(Arc::clone(accelerator)));
        let stop = vcpu.run();
        *locked(&self.running) = (run, None);
        stop
    }
}

/// A port that ends the slot.
struct EndOfSlot(Mutex<std::sync::Weak<SoftAccelerator>>);

impl Handler for EndOfSlot {
    fn read(&self, _offset: u64, _size: u8) -> Option<u64> {
        None
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) -> bool {
        let accelerator = self.0.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(accelerator) = accelerator {
            accelerator.kick(0);
        }
        true
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((head, code)) = bytes.split_first_chunk::<18>() else { return };
    let memory = GuestMemory::new(&[RamRange { base: 0, size: RAM }]).unwrap();
    let bus = Arc::new(Bus::new(Clock::manual()));
    let model = CpuModel::find("terem64", &[]).unwrap();
    let config = SoftConfig {
        model,
        topology: Topology::flat(1),
        phys_bits: 40,
        translate: true,
        direct: terem_soft::Directly::Never,
        trace: None,
    };
    let Ok(accelerator) = SoftAccelerator::new(Arc::clone(&bus), memory.clone(), config) else { return };
    let accelerator = Arc::new(accelerator);
    let port = Arc::new(EndOfSlot(Mutex::new(Arc::downgrade(&accelerator))));
    bus.ports.map(0xf4, 1, "end of a slot", port).unwrap();
    let mut vcpu = accelerator.create_vcpu(0).unwrap();
    let start = start(&memory, head);
    vcpu.restore(&start).unwrap();
    for (i, slot) in (0..).zip(code.chunks(SLOT).take(SLOTS)) {
        let at = CODE + i * SLOT as u64;
        memory.write_slice(slot, GuestAddress(at)).unwrap();
        // What follows a slot ends it: out 0f4h, al; jmp to itself.
        memory.write_slice(&[0xe6, 0xf4, 0xeb, 0xfe], GuestAddress(at + slot.len() as u64)).unwrap();
        let mut state = vcpu.save();
        (state.rip, state.gpr[4], state.mp_state) = (at, STACK, start.mp_state);
        if head[0] & 4 == 0 {
            // In the mode that it began in, with what else the last slot left.
            (state.cr0, state.cr3, state.cr4) = (start.cr0, start.cr3, start.cr4);
            (state.msrs.efer, state.segments, state.rflags) = (start.msrs.efer, start.segments, start.rflags);
            (state.gdtr, state.idtr) = (start.gdtr, start.idtr);
        }
        if vcpu.restore(&state).is_err() {
            return; // no processor is in such a state with this RIP
        }
        let stop = WATCHDOG.run(&accelerator, &mut *vcpu);
        check(&stop, &mut *vcpu);
        if stop == Stop::Shutdown {
            vcpu.restore(&start).unwrap();
        }
    }
});

fn check(stop: &Stop, vcpu: &mut dyn Vcpu) {
    assert!(matches!(stop, Stop::Kicked | Stop::Shutdown), "{stop:?}");
    let s = vcpu.save();
    let (pe, pg, lme, lma) = (s.cr0 & 1, s.cr0 >> 31 & 1, s.msrs.efer >> 8 & 1, s.msrs.efer >> 10 & 1);
    assert!(pg <= pe, "paging without protection: CR0 {:#x}", s.cr0);
    assert_eq!(lma, lme & pg, "long mode: CR0 {:#x}, EFER {:#x}", s.cr0, s.msrs.efer);
    assert!(lma <= s.cr4 >> 5 & 1, "long mode without PAE: CR4 {:#x}", s.cr4);
    assert_eq!(s.rflags & !(0x3f_7fd5 | rflags::FIXED), 0, "RFLAGS {:#x}", s.rflags);
    assert_ne!(s.rflags & rflags::FIXED, 0, "RFLAGS {:#x}", s.rflags);
    assert_eq!(s.cr0 >> 32, 0, "CR0 {:#x}", s.cr0);
    vcpu.restore(&s).unwrap();
    assert_eq!(vcpu.save(), s);
}

/// Fills memory, and gives the state at the first slot.
fn start(memory: &GuestMemory, head: &[u8; 18]) -> VcpuState {
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
    put(STUB, &[0xe6, 0xf4, 0xeb, 0xfe]);
    for (i, d) in (0..).zip(DESCRIPTORS) {
        put(GDT + i * 8, &d.to_le_bytes());
    }
    let mut s = VcpuState::power_on(0, true);
    for (register, byte) in s.gpr.iter_mut().zip(&head[2..]) {
        // Small values, addresses in RAM, and large ones.
        *register = match byte & 3 {
            0 => u64::from(byte >> 2),
            1 => 0x1_0000 | u64::from(byte >> 2) << 9,
            2 => u64::MAX << (byte >> 2),
            _ => u64::from(*byte).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        };
    }
    s.rflags = rflags::FIXED | u64::from(head[1]) & rflags::ARITHMETIC;
    s.gdtr = DescriptorTable { base: GDT, limit: 0x1f };
    let mode = head[0] & 3;
    match mode {
        0 => {
            for vector in 0..256 {
                put(IDT + vector * 4, &u32::try_from(STUB).unwrap().to_le_bytes());
            }
            s.idtr = DescriptorTable { base: IDT, limit: 0x3ff };
            s.segments = [Segment::real_mode(0, false); 6];
            s.segments[VcpuState::CS] = Segment::real_mode(0, true);
        }
        1 => gates(memory, &mut s, 8, 0x18, 0x8e00),
        _ => {
            gates(memory, &mut s, 16, 0x08, 0x8e00);
            // The first 2 MiB, once as a large page and once as small ones, where user code may write too.
            for (at, entry) in [(0, 0x1007), (0x1000, 0x2007), (0x2000, 0x3007), (0x2008, 0x87)] {
                put(PAGE_TABLES + at, &(entry + if entry == 0x87 { 0 } else { PAGE_TABLES }).to_le_bytes());
            }
            for page in 0..512 {
                put(PAGE_TABLES + 0x3000 + page * 8, &(page << 12 | 7).to_le_bytes());
            }
            s.cr0 |= 1 << 31;
            s.cr3 = PAGE_TABLES;
            s.cr4 = 0x6a0 | 1 << 18; // PAE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE
            s.msrs.efer = 0xd01; // SCE, LME, LMA, NXE
            s.segments[VcpuState::CS] = Segment::flat(0x08, true, true);
        }
    }
    s.cr0 = s.cr0 & !(3 << 29 | 0xe) | 2;
    s
}

/// Protected mode with flat segments, and 256 interrupt gates.
fn gates(memory: &GuestMemory, s: &mut VcpuState, size: u64, selector: u16, kind: u64) {
    for vector in 0..256 {
        let gate = STUB | u64::from(selector) << 16 | kind << 32;
        memory.write_slice(&gate.to_le_bytes(), GuestAddress(GATES + vector * size)).unwrap();
    }
    s.idtr = DescriptorTable { base: GATES, limit: u16::try_from(size * 256 - 1).unwrap() };
    s.segments = [Segment::flat(0x10, false, false); 6];
    s.segments[VcpuState::CS] = Segment::flat(0x18, true, false);
    s.cr0 |= 1;
}
