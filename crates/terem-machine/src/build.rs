//! From a plan to a machine: memory, bus, processors, backends, board, kernel.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use terem_block::{Keys, Op};
use terem_bus::{Bus, Clock};
use terem_config::{CharConfig, DirectPrograms};
use terem_cpu::{Accelerator, CpuError, Trace};
use terem_devices::chipset::uart::CharBackend;
use terem_devices::virtio::{Blk, Console, Net, Rng, VirtioDevice};
use terem_memory::{GuestMemory, MemoryError};
use terem_net::NetBackend;
use terem_soft::{Directly, SoftAccelerator, SoftConfig};

use crate::acpi::{Description, Tables, TablesError};
use crate::board::BoardError;
use crate::board::q35::{Connections, Q35};
use crate::boot::{BootError, BootFiles, Loaded};
use crate::consoles::{ConsoleError, Line, Opener, SerialEnd};
use crate::disks::{self, DiskError, OpenDisk};
use crate::gdb::{self, GdbError};
use crate::handle::{Phase, Shared};
use crate::machine::{AtEnd, Events, Firmware, Machine, PrepareError};
use crate::nets::{self, NetError};
use crate::plan::Plan;
use crate::smbios::Smbios;
use crate::trace::{Lines, TraceError, Traces};
use crate::vcpus::Vcpus;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// There is nothing to boot.
    #[error("there is no kernel to boot: give one (--kernel)")]
    NoKernel,
    /// The kernel or initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The processors.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Devices and their places.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The socket for gdb.
    #[error(transparent)]
    Gdb(#[from] GdbError),
    /// A trace's file.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// ACPI tables.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The host has no thread or descriptor left.
    #[error("cannot start a device: {0}")]
    Host(#[from] std::io::Error),
}

impl From<PrepareError> for BuildError {
    fn from(e: PrepareError) -> Self {
        match e {
            PrepareError::Boot(e) => Self::Boot(e),
            PrepareError::Memory(e) => Self::Memory(e),
            PrepareError::Cpu(e) => Self::Cpu(e),
        }
    }
}

/// What the caller lends to a machine.
#[derive(Default)]
pub struct Lent {
    /// The terminal's output, for the console that is on `stdio`. Input comes by
    /// [`crate::MachineHandle::send_input`]. Without it output is dropped.
    pub stdio: Option<Box<dyn CharBackend>>,
    /// Where traces go that have no file. Without it they are dropped.
    pub trace: Option<Lines>,
    /// The passphrases of the disks, in their order; disks beyond its end have none. They are wiped when the disks are
    /// open.
    pub keys: Vec<Keys>,
}

impl std::fmt::Debug for Lent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { stdio, trace, keys: _ } = self;
        f.debug_struct("Lent")
            .field("stdio", &stdio.is_some())
            .field("trace", &trace.is_some())
            .finish_non_exhaustive()
    }
}

/// Backends, opened before anything that needs them is built.
struct Backends {
    disks: Vec<OpenDisk>,
    nets: Vec<Arc<dyn NetBackend>>,
}

impl Backends {
    fn open(plan: &Plan, keys: Vec<Keys>) -> Result<Self, BuildError> {
        let nets = plan.nets.iter().map(nets::open).collect::<Result<_, _>>()?;
        let disks = disks::open_all(&plan.disks, keys)?;
        Ok(Self { disks, nets })
    }
}

impl Machine {
    /// Builds the machine of a plan, with its kernel loaded, standing at the kernel's entry.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn build(plan: Plan, lent: Lent) -> Result<Self, BuildError> {
        let boot = plan.boot.as_ref().ok_or(BuildError::NoKernel)?;
        let files = BootFiles::open(&boot.kernel, boot.initrd.as_deref(), &boot.cmdline)?;
        let backends = Backends::open(&plan, lent.keys)?;
        let memory = GuestMemory::new(&plan.memory.ram())?;
        let bus = Arc::new(Bus::new(Clock::system(0)));
        let gdb_listener = plan.gdb.as_ref().map(|gdb| gdb::Listener::bind(&gdb.listen)).transpose()?;
        let traces = Traces::open(&plan.traces, lent.trace)?;
        let accelerator = accelerator(&plan, &bus, &memory, traces.trace())?;
        let vcpus = Vcpus::new(Arc::clone(&accelerator), plan.cpus.count)?;
        let (sender, messages) = channel();
        let events = Arc::new(Events { gate: Arc::downgrade(vcpus.gate()), messages: sender.clone() });
        let mut consoles = Opener { stdio: lent.stdio, stdio_line: None, notices: Vec::new() };
        let serial = consoles.open("the serial port", &plan.serial)?;
        let connections = Connections {
            bus: Arc::clone(&bus),
            memory: memory.clone(),
            apics: accelerator.apic_bus(),
            msi: accelerator.msi_sink(),
            events,
            serial: Box::new(SerialEnd(Arc::clone(&serial))),
        };
        let mut board = Q35::new(&plan, connections)?;
        feed_serial(&plan, &serial, &board)?;
        plug_in(&plan, &mut board, &backends, &mut consoles, &bus.clock)?;
        let firmware = firmware(&plan, files)?;
        let mut notices = consoles.notices;
        if !plan.cpus.left_out.is_empty() {
            let (model, left_out) = (&plan.cpus.model, plan.cpus.left_out.join(", "));
            notices.push(format!("this host cannot give {model} {left_out}: the guest does without"));
        }
        notices.extend(gdb_listener.as_ref().map(|gdb| format!("gdb: target remote {}", gdb.address())));
        let mut at_end = flushes(&backends.disks);
        at_end.push(Box::new(move || traces.end()));
        let shared = Shared {
            plan,
            bus,
            began: Mutex::new(0),
            now: Mutex::new((Phase::Built, 0, None)),
            listeners: Mutex::default(),
            input: consoles.stdio_line,
            notices,
            accelerator,
        };
        let mut machine = Self {
            shared: Arc::new(shared),
            sender,
            messages,
            vcpus,
            board: Box::new(board),
            memory,
            firmware,
            prepared: false,
            gdb_listener,
            gdb: None,
            paused: false,
            held: false,
            debugged: false,
            debug_run: 0,
            force_at: None,
            at_end,
        };
        let Loaded { kind, entry, .. } = machine.prepare()?;
        tracing::debug!(?kind, entry, "kernel loaded");
        Ok(machine)
    }
}

fn accelerator(
    plan: &Plan,
    bus: &Arc<Bus>,
    memory: &GuestMemory,
    trace: Option<Trace>,
) -> Result<Arc<dyn Accelerator>, BuildError> {
    let c = &plan.cpus;
    let model = c.cpu.clone();
    let translate = plan.accelerator.translate;
    let direct = match plan.accelerator.direct {
        DirectPrograms::Off => Directly::Never,
        DirectPrograms::On => Directly::WorthIt,
        DirectPrograms::Always => Directly::Always,
    };
    let phys_bits = plan.memory.phys_bits;
    let config = SoftConfig { model, topology: c.topology(), phys_bits, translate, direct, trace };
    Ok(Arc::new(SoftAccelerator::new(Arc::clone(bus), memory.clone(), config)?))
}

/// Input of the serial port, where something can come in.
fn feed_serial(plan: &Plan, line: &Arc<Line>, board: &Q35) -> Result<(), BuildError> {
    if !matches!(plan.serial, CharConfig::None | CharConfig::File(_)) {
        line.feed(board.serial())?;
    }
    Ok(())
}

/// Puts the virtio devices into their slots.
fn plug_in(
    plan: &Plan,
    board: &mut Q35,
    backends: &Backends,
    consoles: &mut Opener,
    clock: &Clock,
) -> Result<(), BuildError> {
    if let Some(c) = &plan.console {
        let line = consoles.open("the virtio console", &c.backend)?;
        let console = Arc::new(Console::new(Arc::clone(&line) as _));
        let weak = Arc::downgrade(&console);
        line.set_ready(move || {
            if let Some(console) = weak.upgrade() {
                console.input_ready();
            }
        });
        board.plug_in(c.address, console)?;
    }
    if let Some(address) = plan.rng {
        board.plug_in(address, Arc::new(Rng::new(clock)))?;
    }
    for (net, open) in plan.nets.iter().zip(&backends.nets) {
        let nic: Arc<dyn VirtioDevice> = Arc::new(Net::new(Arc::clone(open), net.mac.0)?);
        board.plug_in(net.address, nic)?;
    }
    for (disk, open) in plan.disks.iter().zip(&backends.disks) {
        let serial = disk.config.serial.as_deref().unwrap_or_default();
        board.plug_in(disk.address, Arc::new(Blk::new(Arc::clone(&open.backend), disk.queues, serial)))?;
    }
    Ok(())
}

fn firmware(plan: &Plan, files: BootFiles) -> Result<Firmware, BuildError> {
    let description = Description {
        map: &plan.memory,
        topology: plan.cpus.topology(),
        cpus: plan.cpus.count,
        caches: plan.cpus.cpu.caches,
        numa: &plan.numa,
        pvpanic: true,
    };
    Ok(Firmware { tables: Tables::new(&description)?, smbios: Smbios::new(plan), files })
}

/// What brings the disks in order at the end: the images are closed when the last device lets go of them, but
/// nobody should have to rely on that.
fn flushes(disks: &[OpenDisk]) -> Vec<AtEnd> {
    let flush = |open: &OpenDisk| -> AtEnd {
        let disk = Arc::clone(&open.disk);
        Box::new(move || {
            if let Err(e) = disk.run(Op::Flush) {
                tracing::error!("the last flush of {} failed: {e}", disk.facts().path.display());
            }
        })
    };
    disks.iter().map(flush).collect()
}
