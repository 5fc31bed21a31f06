//! The socket with a machine that only remembers what was asked of it.

use super::super::protocol::{MachineState, Stat, Status, VERSION};
use super::super::{Client, ClientError, Counters};
use super::*;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

struct Fake {
    console: Option<Arc<Console>>,
    pressed: AtomicUsize,
    killed: AtomicBool,
}

impl ControlTarget for Fake {
    fn status(&self) -> Status {
        Status {
            protocol: VERSION,
            name: "fake".into(),
            state: MachineState::Running,
            pid: std::process::id(),
            cpus: 2,
            memory: 1 << 30,
            uptime_ms: 5,
        }
    }
    fn stat(&self) -> Stat {
        let counters = Counters { page_walks: 7, ..Counters::default() };
        Stat { time_ns: 5_000_000, vcpus: vec![counters; 2] }
    }
    fn inspect(&self) -> serde_json::Value {
        serde_json::json!({"board": "q35"})
    }
    fn power_button(&self) -> Result<(), ControlError> {
        self.pressed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
    }
    fn pause(&self) -> Result<(), ControlError> {
        Err(ControlError::new(ErrorCode::Unavailable, "not now"))
    }
    fn resume(&self) -> Result<(), ControlError> {
        Ok(())
    }
    fn console(&self) -> Option<Arc<Console>> {
        self.console.clone()
    }
}

fn start(dir: &Path, console: Option<Console>) -> (ControlServer, Arc<Fake>, PathBuf) {
    let fake = Arc::new(Fake {
        console: console.map(Arc::new),
        pressed: AtomicUsize::new(0),
        killed: AtomicBool::new(false),
    });
    let claim = Claim::new(dir, "fake").unwrap();
    let path = claim.socket_path();
    (ControlServer::start(claim, fake.clone()).unwrap(), fake, path)
}

#[test]
fn commands_reach_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (server, fake, path) = start(dir.path(), None);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut client = Client::connect(&path).unwrap();
    assert_eq!(client.status().unwrap(), fake.status());
    assert_eq!(client.call(Command::Inspect).unwrap()["board"], "q35");
    client.call(Command::Stop { force: false }).unwrap();
    assert_eq!((fake.pressed.load(Ordering::SeqCst), fake.killed.load(Ordering::SeqCst)), (1, false));
    assert!(matches!(client.call(Command::Pause), Err(ClientError::Refused(e)) if e.message == "not now"));
    client.call(Command::Resume).unwrap();
    assert!(client.call(Command::Console).unwrap_err().to_string().contains("elsewhere"));
    assert!(!client.wait_for_end(Duration::from_millis(20)).unwrap());
    client.call(Command::Stop { force: true }).unwrap();
    assert!(fake.killed.load(Ordering::SeqCst));
    drop(server);
    assert!(client.wait_for_end(Duration::from_secs(5)).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "socket and lock are left");
}

#[test]
fn nonsense_is_answered_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, _, path) = start(dir.path(), None);
    let mut stream = UnixStream::connect(&path).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    for (line, id) in
        [("nonsense", 0), (r#"{"id":9,"command":"dance"}"#, 9), ("", 0), (r#"{"id":-1}"#, 0), ("[[[", 0)]
    {
        writeln!(stream, "{line}").unwrap();
        let answer: Response = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(answer.id, id, "{line}");
        assert!(matches!(answer.outcome, Outcome::Error(e) if e.code == ErrorCode::BadRequest), "{line}");
    }
    // A line without an end is cut off. The server may hang up while it is still being written.
    let _ = stream.write_all(&vec![b'x'; MAX_LINE + 2]);
    let last = lines.next().and_then(Result::ok).unwrap_or_default();
    assert!(last.is_empty() || last.contains("at most 65536 bytes"), "{last}");
    assert!(Client::connect(&path).unwrap().status().is_ok());
}

#[test]
fn connections_are_bounded_and_silent_ones_harm_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, _, path) = start(dir.path(), None);
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let mut client = Client::connect(&path).unwrap();
            client.status().unwrap();
            client
        })
        .collect();
    let refused = Client::connect(&path).unwrap().status().unwrap_err().to_string();
    assert!(refused.contains("connected already"), "{refused}");
    clients.pop();
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while Client::connect(&path).unwrap().status().is_err() {
        assert!(std::time::Instant::now() < until, "a closed connection still counts");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn console_carries_bytes_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (server, fake, path) = start(dir.path(), Some(Console::new(64, false)));
    let console = fake.console.clone().unwrap();
    let (tell, typed) = std::sync::mpsc::channel();
    console.connect(Box::new(move |bytes| {
        let _ = tell.send(bytes.to_vec());
        bytes.len()
    }));
    console.write(b"before ");
    let (first, mut stream) = Client::connect(&path).unwrap().console().unwrap();
    console.write(b"after");
    let mut got = first;
    while got.len() < 12 {
        let mut buffer = [0; 64];
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0);
        got.extend(&buffer[..count]);
    }
    assert_eq!(got, b"before after");
    stream.write_all(b"typed").unwrap();
    let mut input: Vec<u8> = Vec::new();
    while input.len() < 5 {
        input.extend(typed.recv_timeout(Duration::from_secs(5)).unwrap());
    }
    assert_eq!(input, b"typed");
    console.close();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    drop(server);
}

#[test]
fn a_client_that_does_not_read_never_holds_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, fake, path) = start(dir.path(), Some(Console::new(4096, false)));
    let _client = Client::connect(&path).unwrap().console().unwrap();
    let console = fake.console.clone().unwrap();
    let start = std::time::Instant::now();
    for _ in 0..4096 {
        console.write(&[b'x'; 1024]);
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}
