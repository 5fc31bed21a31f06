//! The program as users and scripts call it, for everything that needs no guest.
#![allow(clippy::unwrap_used)] // Here too a panic is how a test fails, also outside of test functions.

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use terem_machine::control::{
    Claim, Console, ControlError, ControlServer, ControlTarget, Counters, MachineState, Stat, Status,
    protocol::VERSION,
};

/// A runtime directory of the test's own, so that tests see neither each other's machines nor the user's.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn runtime(&self) -> PathBuf {
        let dir = self.path("terem");
        let _ = fs::create_dir(&dir);
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        dir
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_terem"));
        command
            .args(words)
            .current_dir(self.0.path())
            .env("XDG_RUNTIME_DIR", self.0.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs it, expects this exit code, and returns standard output and error.
    fn expect(&self, code: i32, words: &[&str]) -> (String, String) {
        let output = self.run(words);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{words:?}\n{out}\n{err}");
        (out, err)
    }
}

/// A machine that only remembers.
struct Fake {
    console: Arc<Console>,
    asked: Mutex<Sender<&'static str>>,
}

impl ControlTarget for Fake {
    fn status(&self) -> Status {
        Status {
            protocol: VERSION,
            name: "fake".into(),
            state: MachineState::Running,
            pid: std::process::id(),
            cpus: 3,
            memory: 512 << 20,
            uptime_ms: 65_000,
        }
    }
    fn stat(&self) -> Stat {
        let counters = Counters { page_walks: 7, ..Counters::default() };
        Stat { time_ns: 5_000_000, vcpus: vec![counters; 2] }
    }
    fn inspect(&self) -> serde_json::Value {
        serde_json::json!({"plan": {"name": "fake"}})
    }
    fn power_button(&self) -> Result<(), ControlError> {
        self.asked.lock().unwrap().send("button").unwrap();
        Ok(())
    }
    fn kill(&self) {
        self.asked.lock().unwrap().send("kill").unwrap();
    }
    fn pause(&self) -> Result<(), ControlError> {
        Ok(())
    }
    fn resume(&self) -> Result<(), ControlError> {
        Ok(())
    }
    fn console(&self) -> Option<Arc<Console>> {
        Some(self.console.clone())
    }
}

fn fake_machine(home: &Home) -> (ControlServer, Arc<Console>, Receiver<&'static str>) {
    let (asked, asks) = channel();
    let console = Arc::new(Console::new(4096, false));
    let claim = Claim::new(&home.runtime(), "fake").unwrap();
    let fake = Fake { console: console.clone(), asked: Mutex::new(asked) };
    (ControlServer::start(claim, Arc::new(fake)).unwrap(), console, asks)
}

#[test]
fn every_mistake_is_one_line() {
    let home = Home::new();
    let words = [
        "run",
        "--memory",
        "4X",
        "--cpus",
        "0",
        "--disk",
        "a,formt=raw",
        "--disk",
        "b,cache=some",
        "--net",
        "lan",
    ];
    let (out, err) = home.expect(2, &words);
    assert_eq!(out, "");
    let lines: Vec<_> = err.lines().collect();
    assert_eq!(lines.len(), 7, "{err}");
    assert!(
        lines[0].starts_with("terem: memory = \"4X\": `X` is no unit of size; expected a whole number"),
        "{err}"
    );
    assert!(lines[1].ends_with("(did you mean `format`?)"), "{err}");
    assert_eq!(
        lines[2],
        "terem: disk[0].cache = \"some\": it is none of the choices; expected one of `writeback`, `none`, `unsafe`"
    );
    assert!(lines[3].starts_with("terem: net[0].type = \"lan\": it is none of the choices"), "{err}");
    // What could be read is checked as well.
    assert!(lines[4].starts_with("terem: kernel: it is needed"), "{err}");
    assert!(lines[5].starts_with("terem: cpus.count = 0: a machine needs a vCPU"), "{err}");
    assert!(lines[6].starts_with("  hint: "), "{err}");
    let (_, err) = home.expect(2, &["run", "--cpus", "0", "--memory", "1K", "--kernel", "k"]);
    assert_eq!(err.lines().count(), 3, "{err}");
}

#[test]
fn mistakes_in_a_file_name_their_line() {
    let home = Home::new();
    fs::write(home.path("m.toml"), "memory = \"1G\"\nkernle = \"k\"\n[[disk]]\npath = 3\n").unwrap();
    for words in [["run", "m.toml"].as_slice(), &["config", "check", "m.toml"]] {
        let (_, err) = home.expect(2, words);
        assert!(err.contains("terem: m.toml:2: kernle: there is no such key"), "{err}");
        assert!(err.contains("(did you mean `kernel`?)"), "{err}");
        assert!(
            err.contains("terem: m.toml:4: disk[0].path = 3: invalid type: integer `3`; expected"),
            "{err}"
        );
    }
    let (_, err) = home.expect(2, &["run", "none.toml"]);
    assert!(err.contains("cannot read the machine file none.toml: No such file"), "{err}");
}

#[test]
fn usage_mistakes_end_with_2() {
    let home = Home::new();
    home.expect(2, &["run", "--nonsense"]);
    home.expect(2, &[]);
    home.expect(2, &["run", "--log", "loud=7=8", "--kernel", "k", "--plan"]);
    let (out, _) = home.expect(0, &["run", "--help"]);
    for part in ["Exit codes:", "the guest's kernel panicked", "format=probe|raw|qcow2", "Ctrl-a x"] {
        assert!(out.contains(part), "no `{part}`");
    }
}

#[test]
fn printed_configuration_is_the_same_machine() {
    let home = Home::new();
    let flags = [
        "run",
        "--print-config",
        "--name",
        "web",
        "--cpus",
        "4,threads=2",
        "--memory",
        "1536M",
        "--cpu",
        "host,-avx2,+aes",
        "--accel",
        "soft",
        "--disk",
        "data.qcow2,format=qcow2,readonly",
        "--net",
        "user,forward=tcp:2222:22",
        "--kernel",
        "/k",
        "--cmdline",
        "a=\"b c\" 'd'",
        "--serial",
        "file:/log",
        "--rng=off",
        "--no-reboot",
        "/root.img",
    ];
    let (first, _) = home.expect(0, &flags);
    let elsewhere = home.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(home.path("m.toml"), &first).unwrap();
    let (second, _) = home.expect(0, &["run", "--print-config", "m.toml"]);
    assert_eq!(first, second);
    let (json, _) = home.expect(0, &["run", "--print-config", "--json", "m.toml"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["memory"], &json["disk"][0]["path"]), (&"1536M".into(), &"/root.img".into()));
}

#[test]
fn plan_is_shown_and_nothing_is_done() {
    let home = Home::new();
    let words =
        ["run", "--plan", "--kernel", "/none", "--memory", "512M", "--name", "planned", "/none.qcow2"];
    let (text, _) = home.expect(0, &words);
    assert!(text.contains("planned") && text.contains("/dev/vda"), "{text}");
    let (json, _) = home.expect(0, &[words.as_slice(), &["--json"]].concat());
    let plan: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(plan["name"], "planned");
    assert!(fs::read_dir(home.0.path()).unwrap().next().is_none(), "something was made");
    let (_, err) = home.expect(2, &["run", "--plan", "--kernel", "k", "--memory", "30T", "--accel", "kvm"]);
    assert!(err.contains("--memory") && err.contains("--accel soft"), "{err}");
}

#[test]
fn a_missing_kernel_is_the_hosts_failure() {
    let home = Home::new();
    for words in [["run"].as_slice(), &["run", "--detach"]] {
        let (out, err) = home.expect(
            1,
            &[words, &["--net", "none", "--kernel", "/nowhere/vmlinuz", "/nowhere/d.img"]].concat(),
        );
        assert_eq!(out, "");
        let last = err.lines().rfind(|line| line.starts_with("terem: cannot run d: ")).unwrap_or_default();
        assert!(last.contains("/nowhere"), "{err}");
        assert!(!err.contains("Error {") && !err.contains("Os {"), "{err}");
    }
    let (out, _) = home.expect(0, &["ps", "--json"]);
    assert_eq!(out, "[]\n");
}

#[test]
fn names_are_unique() {
    let home = Home::new();
    let _machine = fake_machine(&home);
    let (_, err) = home.expect(2, &["run", "--name", "fake", "--kernel", "k"]);
    assert!(
        err.contains(&format!("a machine named fake is running (process {})", std::process::id())),
        "{err}"
    );
    assert!(err.contains("hint: another --name, or `terem stop fake`"), "{err}");
    let (_, err) = home.expect(2, &["run", "--name", "no/slash", "--kernel", "k"]);
    assert!(err.contains("name = \"no/slash\""), "{err}");
}

#[test]
fn stat_shows_counters_and_rates() {
    let home = Home::new();
    let _machine = fake_machine(&home);
    let row = |words: &[&str], title: &str| -> Vec<String> {
        let (out, _) = home.expect(0, words);
        let line = out.lines().find(|l| l.starts_with(title)).unwrap();
        line[title.len()..].split_whitespace().map(String::from).collect()
    };
    assert_eq!(row(&["stat", "fake"], "page walks"), ["7", "7"]);
    assert_eq!(row(&["stat", "fake", "--interval", "1"], "page walks/s"), ["0.0", "0.0"]);
    let (out, _) = home.expect(0, &["stat", "fake", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&json["vcpus"][1]["page_walks"], &json["time_ns"]), (&7.into(), &5_000_000.into()));
    home.expect(2, &["stat", "fake", "--interval", "0"]);
    let (_, err) = home.expect(1, &["stat", "nobody"]);
    assert!(err.contains("no machine of this name") && err.contains("running: fake"), "{err}");
}

#[test]
fn ps_lists_the_living_and_buries_the_dead() {
    let home = Home::new();
    let runtime = home.runtime();
    fs::write(runtime.join("dead.lock"), "4000000\n").unwrap();
    drop(std::os::unix::net::UnixListener::bind(runtime.join("dead.sock")).unwrap());
    let (server, ..) = fake_machine(&home);
    let (out, _) = home.expect(0, &["ps"]);
    let lines: Vec<_> = out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    let pid = std::process::id().to_string();
    assert_eq!(lines[1..], [vec!["fake", &pid, "running", "3", "512M", "1m05s"]]);
    assert!(!runtime.join("dead.lock").exists() && !runtime.join("dead.sock").exists());
    let (out, _) = home.expect(0, &["inspect", "fake"]);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["plan"]["name"], "fake");
    drop(server);
    let (_, err) = home.expect(1, &["inspect", "fake"]);
    assert_eq!(
        err,
        "terem: cannot inspect fake: no machine of this name is running\n  hint: no machine is running\n"
    );
}

#[test]
fn a_runtime_directory_that_others_may_enter_is_refused() {
    let home = Home::new();
    fs::set_permissions(home.runtime(), fs::Permissions::from_mode(0o755)).unwrap();
    let (_, err) = home.expect(1, &["ps"]);
    assert!(err.contains("is not safe: other users may enter it"), "{err}");
}

#[test]
fn stop_asks_first_and_then_insists() {
    let home = Home::new();
    let (server, _, asks) = fake_machine(&home);
    let obeys = std::thread::spawn(move || {
        assert_eq!(asks.recv().unwrap(), "button");
        drop(server);
    });
    home.expect(0, &["stop", "fake"]);
    obeys.join().unwrap();

    let (server, _, asks) = fake_machine(&home);
    let resists = std::thread::spawn(move || {
        assert_eq!(asks.recv().unwrap(), "button");
        assert_eq!(asks.recv().unwrap(), "kill");
        drop(server);
    });
    let (_, err) = home.expect(0, &["stop", "fake", "--timeout", "1"]);
    assert!(err.contains("fake has not switched itself off within 1 s; it is stopped by force"), "{err}");
    resists.join().unwrap();

    let (server, _, asks) = fake_machine(&home);
    let dies = std::thread::spawn(move || {
        assert_eq!(asks.recv().unwrap(), "kill");
        drop(server);
    });
    home.expect(0, &["stop", "--force", "fake"]);
    dies.join().unwrap();
}

/// Waits until `condition` holds.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "not {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The two ends of a pseudo-terminal.
fn terminal() -> (OwnedFd, OwnedFd) {
    let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&control).unwrap();
    unlockpt(&control).unwrap();
    let name = ptsname(&control, Vec::new()).unwrap();
    let terminal = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (control, terminal)
}

fn is_cooked(terminal: &OwnedFd) -> bool {
    tcgetattr(terminal)
        .unwrap()
        .local_modes
        .contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

fn attached(home: &Home, terminal: &OwnedFd) -> Child {
    let child =
        home.command(&["console", "fake"]).stdin(terminal.try_clone().unwrap()).stderr(Stdio::null()).spawn();
    let child = child.unwrap();
    until("raw", || !is_cooked(terminal));
    child
}

#[test]
fn the_terminal_is_put_back() {
    let home = Home::new();
    let (server, console, _) = fake_machine(&home);
    let (control, terminal) = terminal();
    let mut control = fs::File::from(control);
    assert!(is_cooked(&terminal));
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut child = attached(&home, &terminal);
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert!(!child.wait().unwrap().success(), "{signal:?}");
        assert!(is_cooked(&terminal), "{signal:?}");
    }
    // Stopped by the shell and continued.
    let mut child = attached(&home, &terminal);
    kill_process(Pid::from_child(&child), Signal::TSTP).unwrap();
    until("cooked", || is_cooked(&terminal));
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    until("raw again", || !is_cooked(&terminal));
    // Left by key.
    control.write_all(b"\x01x").unwrap();
    assert!(child.wait().unwrap().success());
    assert!(is_cooked(&terminal));
    // Left by the machine.
    let mut child = attached(&home, &terminal);
    console.close();
    assert!(child.wait().unwrap().success());
    assert!(is_cooked(&terminal));
    drop(server);
}

#[test]
fn console_carries_pipes() {
    let home = Home::new();
    let (server, console, _) = fake_machine(&home);
    let (tell, typed) = channel();
    console.connect(Box::new(move |bytes| {
        tell.send(bytes.to_vec()).unwrap();
        bytes.len()
    }));
    console.write(b"login: ");
    let mut child =
        home.command(&["console", "fake"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Not a terminal: `Ctrl-a x` is for the guest like everything else, and the end of input ends nothing.
    child.stdin.take().unwrap().write_all(b"ro\x01xot").unwrap();
    let mut got = Vec::new();
    while got.len() < 6 {
        got.extend(typed.recv_timeout(Duration::from_secs(20)).unwrap());
    }
    assert_eq!(got, b"ro\x01xot");
    console.write(b"welcome");
    console.close();
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(out, "login: welcome");
    assert!(child.wait().unwrap().success());
    drop(server);
}

#[test]
fn schemas_are_json() {
    let home = Home::new();
    for words in [["config", "schema"].as_slice(), &["config", "schema", "--control"]] {
        let (out, _) = home.expect(0, words);
        let schema: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    }
    let (out, _) = home.expect(0, &["host", "--json"]);
    let host: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(host["memory_total"].as_u64().unwrap() > 0 && host["kvm"]["reason"].is_string());
}

#[test]
fn disks_are_made_copied_and_checked() {
    let home = Home::new();
    let pattern: Vec<u8> = (0..3_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    fs::write(home.path("a.raw"), &pattern).unwrap();
    home.expect(0, &["disk", "convert", "--from", "raw", "--to", "qcow2", "a.raw", "a.qcow2"]);
    let (out, _) = home.expect(0, &["disk", "info", "--json", "a.qcow2"]);
    let info: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&info["format"], info["virtual-size"].as_u64()), (&"qcow2".into(), Some(12_000_256)));
    home.expect(0, &["disk", "check", "a.qcow2"]);
    home.expect(0, &["disk", "convert", "--from", "qcow2", "--to", "raw", "a.qcow2", "b.raw"]);
    let back = fs::read(home.path("b.raw")).unwrap();
    assert!(back.starts_with(&pattern) && back.len() == 12_000_256);
    let (_, err) = home.expect(1, &["disk", "convert", "a.raw", "a.qcow2"]);
    assert!(err.contains("hint: --overwrite replaces it"), "{err}");
    home.expect(0, &["disk", "create", "new.qcow2", "20G"]);
    let (out, _) = home.expect(0, &["disk", "info", "new.qcow2"]);
    assert!(out.contains("20.0 GiB"), "{out}");
    let (_, err) = home.expect(1, &["disk", "info", "nowhere.img"]);
    assert!(err.starts_with("terem: cannot read nowhere.img: "), "{err}");
    damage(&home.path("a.qcow2"));
    home.expect(7, &["disk", "check", "a.qcow2"]);
}

/// Lets the second cluster of the disk point where the first points.
fn damage(image: &Path) {
    let mut bytes = fs::read(image).unwrap();
    let number = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    // qcow2 header: l1_table_offset at byte 40; entries hold offsets in bits 9 to 55.
    let offset = |entry: u64| usize::try_from(entry & 0x00ff_ffff_ffff_fe00).unwrap();
    let l1 = offset(number(&bytes, 40));
    let l2 = offset(number(&bytes, l1));
    let first: [u8; 8] = bytes[l2..l2 + 8].try_into().unwrap();
    bytes[l2 + 8..l2 + 16].copy_from_slice(&first);
    fs::write(image, bytes).unwrap();
}

#[test]
fn encrypted_disks_and_their_keys() {
    let home = Home::new();
    for (name, text) in [("one", "first"), ("two", "second"), ("wrong", "first\n")] {
        fs::write(home.path(name), text).unwrap();
    }
    let cheap = "iter-time=1";
    let (_, err) = home.expect(1, &["disk", "create", "--format", "luks", "-o", cheap, "a.luks", "1M"]);
    assert!(
        err.contains("a.luks: is encrypted; give its passphrase") && err.contains("--new-passphrase"),
        "{err}"
    );
    let create = ["disk", "create", "--format", "luks", "-o", cheap, "a.luks", "1M"];
    home.expect(0, &[&create[..], &["--new-passphrase", "file:one"]].concat());
    let (out, _) = home.expect(0, &["disk", "info", "a.luks"]);
    assert!(
        out.contains("LUKS 1, aes-xts-plain64, 512 bits") && out.contains("key slots     1 in use: 0\n"),
        "{out}"
    );

    let with = |passphrase, more: &[&str]| -> Vec<String> {
        ["disk", "--passphrase", passphrase].iter().chain(more).map(ToString::to_string).collect()
    };
    let expect = |code, passphrase, more: &[&str]| {
        let arguments = with(passphrase, more);
        home.expect(code, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (_, err) = expect(1, "file:wrong", &["convert", "a.luks", "a.qcow2"]);
    assert!(err.contains("the passphrase opens none of its key slots"), "{err}");
    expect(0, "file:one", &["convert", "a.luks", "a.qcow2"]);
    let (_, err) = expect(2, "first", &["convert", "a.luks", "b.qcow2"]);
    assert!(err.contains("file:PATH, fd:NUMBER or ask"), "{err}");

    let add = ["key", "add", "--iterations", "1000", "--new-passphrase", "file:two", "a.luks"];
    let (out, _) = expect(0, "file:one", &add);
    assert_eq!(out, "key slot 1 added\n");
    expect(1, "file:one", &["key", "remove", "--slot", "0", "a.luks"]);
    expect(0, "file:one", &["key", "remove", "a.luks"]);
    expect(1, "file:two", &["key", "remove", "a.luks"]);
    expect(1, "file:one", &["convert", "--overwrite", "a.luks", "a.qcow2"]);
    expect(0, "file:two", &["compare", "a.luks", "a.qcow2"]);
    let (out, _) = home.expect(0, &["disk", "key", "list", "--json", "a.luks"]);
    assert!(out.contains("\"slot\": 1") && !out.contains("\"slot\": 0"), "{out}");
}

#[test]
fn disks_of_a_machine_take_passphrases_and_limits() {
    let home = Home::new();
    fs::write(home.path("one"), "first").unwrap();
    fs::write(home.path("wrong"), "second").unwrap();
    let create = ["disk", "create", "--format", "luks", "-o", "iter-time=1", "--new-passphrase", "file:one"];
    home.expect(0, &[&create[..], &["a.luks", "1M"]].concat());
    // What has no kernel is not built: the disks are looked at before that fails.
    fs::write(home.path("k"), [0; 4096]).unwrap();
    let (_, err) = home.expect(2, &["run", "--kernel", "k", "--disk", "a.luks,passphrase=first"]);
    assert!(err.contains("file:PATH, fd:NUMBER or ask"), "{err}");
    let (_, err) = home.expect(1, &["run", "--kernel", "k", "--disk", "a.luks,passphrase=file:nowhere"]);
    assert!(err.contains("cannot read a passphrase from nowhere"), "{err}");
    let (out, _) = home.expect(
        0,
        &["run", "--print-config", "--kernel", "k", "--disk", "a.luks,passphrase=file:one,bps-write=10M"],
    );
    assert!(out.contains("passphrase = [\"file:one\"]") && out.contains("bps_write = \"10M\""), "{out}");
    assert!(!out.contains("first"), "{out}");

    fs::write(home.path("a.raw"), vec![0; 1 << 20]).unwrap();
    let bench =
        |throttle| ["disk", "bench", "--format", "raw", "--count", "20", "--throttle", throttle, "a.raw"];
    home.expect(0, &bench("iops=1000,iops-max=2000"));
    for (wrong, text) in [
        ("iops=5,iops-read=5", "--throttle: iops: not besides a limit on reads or writes alone"),
        ("iosp=5", "--throttle: iosp: there is no such key"),
        ("bps=5,bps-max=4", "--throttle: bps: a burst is slower than the limit"),
    ] {
        let (_, err) = home.expect(2, &bench(wrong));
        assert!(err.contains(text), "{err}");
    }
}
