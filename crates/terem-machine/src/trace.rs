//! What vCPUs tell of what they do, as lines in files.
//!
//! ```text
//!   vcpu0, vcpu1 … ──TraceEvent──> Queue (bounded) ──thread "trace"──> lines ──> file, or standard error
//! ```
//!
//! A vCPU leaves a few words in a queue; disassembling, formatting and writing is the thread's. A vCPU whose queue is
//! full waits for the writer, so that nothing is missing, but not for ever: a file that does not take anything for
//! [`PATIENCE`] loses lines, and the trace says how many.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions, FastFormatter};
use terem_bus::locked;
use terem_config::{TraceConfig, TraceWhat};
use terem_cpu::{
    Exit, InstructionBytes, Interruption, InterruptionKind, Trace, TraceEvent, TraceKind, TraceSink,
};

/// Events that wait to be written, at most.
const QUEUE: usize = 1 << 16;
/// How long a vCPU waits for room.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the machine's end waits for the last lines.
const LAST_LINES: Duration = Duration::from_secs(10);

/// Why a trace cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the trace to {path}: {source}", path = path.display())]
pub struct TraceError {
    path: PathBuf,
    source: io::Error,
}

/// Where a trace goes that has no file.
pub type Lines = Box<dyn Write + Send>;

#[derive(Default)]
struct State {
    events: Vec<(u32, TraceEvent)>,
    lost: u64,
    /// The writer does not take any more: who has to wait any longer does not wait at all.
    stuck: bool,
    end: bool,
    /// The writer has written everything.
    done: bool,
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    more: Condvar,
    room: Condvar,
}

impl TraceSink for Queue {
    fn event(&self, vcpu: u32, event: TraceEvent) {
        let mut state = locked(&self.state);
        if state.events.len() >= QUEUE && !state.stuck {
            let full = |s: &mut State| s.events.len() >= QUEUE && !s.stuck;
            let waited = self.room.wait_timeout_while(state, PATIENCE, full);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.events.len() >= QUEUE {
            state.stuck = true;
            state.lost += 1;
            return;
        }
        state.events.push((vcpu, event));
        if state.events.len() == 1 {
            self.more.notify_one();
        }
    }
}

impl Queue {
    /// Everything that waits, and how much was lost; `None` at the end.
    fn take(&self, mut into: Vec<(u32, TraceEvent)>) -> Option<(Vec<(u32, TraceEvent)>, u64)> {
        into.clear();
        let state = locked(&self.state);
        let waited = self.more.wait_while(state, |s| s.events.is_empty() && s.lost == 0 && !s.end);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.events.is_empty() && state.lost == 0 {
            return None;
        }
        state.stuck = false;
        let lost = std::mem::take(&mut state.lost);
        let events = std::mem::replace(&mut state.events, into);
        self.room.notify_all();
        Some((events, lost))
    }

    fn write(&self, mut to: Lines) {
        let (mut spare, mut line) = (Vec::new(), String::new());
        let mut formatter = Formatter::default();
        while let Some((events, lost)) = self.take(spare) {
            let mut write = || -> io::Result<()> {
                for (vcpu, event) in &events {
                    line.clear();
                    formatter.line(*vcpu, event, &mut line);
                    to.write_all(line.as_bytes())?;
                }
                if lost > 0 {
                    writeln!(to, "… {lost} lines are missing: they could not be written fast enough")?;
                }
                to.flush()
            };
            if let Err(e) = write() {
                tracing::warn!("a trace ends: {e}");
                to = Box::new(io::sink());
            }
            spare = events;
        }
        locked(&self.state).done = true;
        self.room.notify_all();
    }

    /// Lets the writer end; waits for it, but not for ever.
    fn end(&self) {
        let mut state = locked(&self.state);
        state.end = true;
        self.more.notify_all();
        let _ = self.room.wait_timeout_while(state, LAST_LINES, |s| !s.done);
    }
}

/// Turns events to lines.
#[derive(Default)]
struct Formatter {
    instructions: FastFormatter,
}

impl Formatter {
    /// `VCPU SELECTOR:RIP …`
    fn line(&mut self, vcpu: u32, event: &TraceEvent, to: &mut String) {
        let TraceEvent { selector, rip, kind } = event;
        let _ = write!(to, "{vcpu} {selector:04x}:{rip:016x} ");
        match kind {
            TraceKind::Instruction(bytes) => self.instruction(*rip, bytes, to),
            TraceKind::Interruption(i) => interruption(i, to),
            TraceKind::Exit(e) => exit(e, to),
        }
        to.push('\n');
    }

    fn instruction(&mut self, rip: u64, bytes: &InstructionBytes, to: &mut String) {
        let InstructionBytes { bytes, len, bits } = bytes;
        if *len == 0 {
            return to.push_str("(not in RAM)");
        }
        let bytes = &bytes[..usize::from(*len)];
        let mut decoder = Decoder::with_ip(u32::from(*bits), bytes, rip, DecoderOptions::NONE);
        self.instructions.format(&decoder.decode(), to);
    }
}

/// The exceptions that have names (Intel SDM vol. 3, table 6-1).
const NAMES: [&str; 22] = [
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP", "#PF", "",
    "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
];

fn interruption(i: &Interruption, to: &mut String) {
    let Interruption { kind, vector, error, address } = i;
    let what = match kind {
        InterruptionKind::Exception => "exception",
        InterruptionKind::Software => "int",
        InterruptionKind::External => "interrupt",
    };
    let _ = write!(to, "{what} {vector:#04x}");
    let name = NAMES.get(usize::from(*vector)).filter(|name| !name.is_empty());
    if let Some(name) = name.filter(|_| *kind != InterruptionKind::Software) {
        let _ = write!(to, " {name}");
    }
    if let Some(error) = error {
        let _ = write!(to, " error {error:#x}");
    }
    if let Some(address) = address {
        let _ = write!(to, " address {address:#x}");
    }
}

fn exit(e: &Exit, to: &mut String) {
    let Exit { port, address, size, write, value } = e;
    let what = match (port, write) {
        (true, true) => "out",
        (true, false) => "in",
        (false, true) => "mmio write",
        (false, false) => "mmio read",
    };
    let _ = write!(to, "{what} {address:#x} size {size} value {value:#x}");
}

/// All traces of a machine.
pub(crate) struct Traces {
    queues: Vec<Arc<Queue>>,
    trace: Option<Trace>,
}

/// Sends each event to the traces that are about it.
struct Switch {
    instructions: Option<Arc<Queue>>,
    interrupts: Option<Arc<Queue>>,
    exits: Option<Arc<Queue>>,
}

impl TraceSink for Switch {
    fn event(&self, vcpu: u32, event: TraceEvent) {
        let queue = match event.kind {
            TraceKind::Instruction(_) => &self.instructions,
            TraceKind::Interruption(_) => &self.interrupts,
            TraceKind::Exit(_) => &self.exits,
        };
        if let Some(queue) = queue {
            queue.event(vcpu, event);
        }
    }
}

impl Traces {
    /// Opens the files and starts a thread for each. `standard` is where traces without a file go.
    ///
    /// # Errors
    /// A file cannot be made, or the host has no thread left.
    pub(crate) fn open(wanted: &[TraceConfig], mut standard: Option<Lines>) -> Result<Self, TraceError> {
        let mut open: HashMap<Option<&Path>, Arc<Queue>> = HashMap::new();
        let mut switch = Switch { instructions: None, interrupts: None, exits: None };
        for trace in wanted {
            let path = trace.file.as_deref();
            let queue = match open.get(&path) {
                Some(queue) => Arc::clone(queue),
                None => {
                    let queue = start(path, &mut standard).map_err(|source| {
                        let path = path.unwrap_or(Path::new("standard error")).into();
                        TraceError { path, source }
                    })?;
                    open.insert(path, Arc::clone(&queue));
                    queue
                }
            };
            let place = match trace.what {
                TraceWhat::Instructions => &mut switch.instructions,
                TraceWhat::Interrupts => &mut switch.interrupts,
                TraceWhat::Exits => &mut switch.exits,
            };
            *place = Some(queue);
        }
        let trace = Trace {
            instructions: switch.instructions.is_some(),
            interrupts: switch.interrupts.is_some(),
            exits: switch.exits.is_some(),
            sink: Arc::new(switch),
        };
        Ok(Self { queues: open.into_values().collect(), trace: (!wanted.is_empty()).then_some(trace) })
    }

    /// What the vCPUs are to tell, if anything.
    pub(crate) fn trace(&self) -> Option<Trace> {
        self.trace.clone()
    }

    /// Writes what is left.
    pub(crate) fn end(&self) {
        self.queues.iter().for_each(|queue| queue.end());
    }
}

fn start(path: Option<&Path>, standard: &mut Option<Lines>) -> io::Result<Arc<Queue>> {
    let lines: Lines = match path {
        Some(path) => Box::new(BufWriter::new(File::create(path)?)),
        None => Box::new(BufWriter::new(standard.take().unwrap_or_else(|| Box::new(io::sink())))),
    };
    let queue = Arc::new(Queue::default());
    let writer = Arc::clone(&queue);
    std::thread::Builder::new().name("trace".into()).spawn(move || writer.write(lines))?;
    Ok(queue)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: TraceKind) -> String {
        let mut line = String::new();
        Formatter::default().line(3, &TraceEvent { selector: 8, rip: 0x20_0020, kind }, &mut line);
        line
    }

    #[test]
    fn lines_are_as_documented() {
        let code = [0x74, 0xfe];
        let mut bytes = [0; 15];
        bytes[..2].copy_from_slice(&code);
        assert_eq!(
            line(TraceKind::Instruction(InstructionBytes { bytes, len: 2, bits: 64 })),
            "3 0008:0000000000200020 je 200020h\n"
        );
        let fault = Interruption {
            kind: InterruptionKind::Exception,
            vector: 14,
            error: Some(2),
            address: Some(0xffff_8000_0000_0000),
        };
        assert_eq!(
            line(TraceKind::Interruption(fault)),
            "3 0008:0000000000200020 exception 0x0e #PF error 0x2 address 0xffff800000000000\n"
        );
        let int = Interruption { kind: InterruptionKind::Software, vector: 0x80, error: None, address: None };
        assert_eq!(line(TraceKind::Interruption(int)), "3 0008:0000000000200020 int 0x80\n");
        let out = Exit { port: true, address: 0x3f8, size: 1, write: true, value: 0x41 };
        assert_eq!(line(TraceKind::Exit(out)), "3 0008:0000000000200020 out 0x3f8 size 1 value 0x41\n");
    }

    /// A file that takes nothing until it is told to.
    struct Stuck(Arc<Mutex<()>>, Arc<Mutex<Vec<u8>>>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            drop(locked(&self.0));
            locked(&self.1).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_file_that_is_stuck_costs_lines_and_says_so() {
        let (gate, text): (Arc<Mutex<()>>, Arc<Mutex<Vec<u8>>>) = Default::default();
        let stuck = locked(&gate);
        let lines = Stuck(Arc::clone(&gate), Arc::clone(&text));
        let config = [TraceConfig { what: TraceWhat::Exits, file: None }];
        let traces = Traces::open(&config, Some(Box::new(lines))).unwrap();
        let sink = traces.trace().unwrap().sink;
        let exit = Exit { port: true, address: 1, size: 1, write: true, value: 0 };
        // The writer may hold a whole queue, and one waits; what is beyond is lost after one wait.
        let (sent, kept) = (3 * QUEUE, 2 * QUEUE);
        for rip in 0..sent as u64 {
            sink.event(0, TraceEvent { selector: 0, rip, kind: TraceKind::Exit(exit) });
        }
        drop(stuck);
        traces.end();
        let text = String::from_utf8(locked(&text).clone()).unwrap();
        let written = text.lines().filter(|l| l.contains("out 0x1")).count();
        let lost: usize = text
            .lines()
            .filter_map(|l| l.strip_prefix("… ").and_then(|l| l.split(' ').next()?.parse::<usize>().ok()))
            .sum();
        assert!(written >= QUEUE && written <= kept, "{written}");
        assert_eq!(written + lost, sent);
    }
}
