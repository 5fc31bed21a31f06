//! The NBD server against QEMU's and libnbd's clients, and against clients that mean no good.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer::{Random, Scratch, assert_clean, options, read, run, str, try_run};
use terem_block::{AioEngine, Disk, NbdExport, NbdListener, NbdServer, NbdServerOptions, OpenOptions};

fn export(name: &str, disk: &Arc<Disk>) -> NbdExport {
    NbdExport { name: name.into(), description: format!("the {name} disk"), disk: Arc::clone(disk) }
}

/// A server on a Unix socket; and the address of its default export.
fn serve(
    scratch: &Scratch,
    exports: Vec<NbdExport>,
    options: NbdServerOptions,
) -> (NbdServer, String, PathBuf) {
    let socket = scratch.path("socket");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("a socket");
    let server = NbdServer::start(exports, vec![NbdListener::Unix(listener)], options).expect("started");
    (server, format!("nbd+unix:///?socket={}", socket.display()), socket)
}

fn qcow2(scratch: &Scratch, size: &str, aio: AioEngine) -> (PathBuf, Arc<Disk>) {
    let image = scratch.path("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", str(&image), size]);
    let disk = Arc::new(Disk::open(&image, &options(aio)).expect("opened"));
    (image, disk)
}

/// Whether it becomes true before long.
fn eventually(mut what: impl FnMut() -> bool) -> bool {
    (0..1000).any(|_| {
        what() || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }
    })
}

/// Ends the server and closes the disk.
fn end(server: NbdServer, disk: Arc<Disk>) {
    server.stop();
    Arc::into_inner(disk).expect("nobody else has it").close().expect("closed");
}

/// Random operations by qemu-io, the same ones on the export and on a raw file, then compared.
#[test]
fn qemu_io_does_the_same_as_on_a_file() {
    for (seed, aio) in [(1, AioEngine::IoUring), (2, AioEngine::Threads)] {
        let scratch = Scratch::new();
        let (image, disk) = qcow2(&scratch, "16M", aio);
        let (server, uri, _) = serve(&scratch, vec![export("", &disk)], NbdServerOptions::default());
        let model = scratch.path("model.raw");
        run("qemu-img", &["create", "-q", "-f", "raw", str(&model), "16M"]);
        let mut random = Random(seed);
        let mut commands = Vec::new();
        for _ in 0..150 {
            let most = if random.below(4) == 0 { 4 << 20 } else { 100 << 10 };
            let length = (1 + random.below(most)).next_multiple_of([1, 512, 4096][random.below(3) as usize]);
            let offset = random.below((16 << 20) - length);
            let pattern = 1 + random.below(255);
            commands.push(match random.below(6) {
                0 => format!("write -P {pattern} {offset} {length}"),
                1 => format!("write -f -P {pattern} {offset} {length}"),
                2 => format!("write -z {offset} {length}"),
                3 => format!("write -z -u {offset} {length}"),
                4 => format!("aio_write -P {pattern} {offset} {length}"),
                _ => "flush".into(),
            });
            if commands.last().is_some_and(|c| c.starts_with("aio")) {
                commands.push("aio_flush".into());
            }
        }
        for target in [uri.as_str(), str(&model)] {
            let mut io = Command::new("qemu-io");
            io.args(["-f", "raw", target]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut io = io.spawn().expect("qemu-io");
            io.stdin.take().expect("piped").write_all(commands.join("\n").as_bytes()).expect("written");
            let out = io.wait_with_output().expect("ended");
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && !text.contains("failed"), "{target}: {text}");
        }
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, str(&model)]);
        // Through structured replies with holes, on four connections at once.
        let copy = scratch.path("copy.raw");
        run("nbdcopy", &["--connections=4", "--requests=16", &uri, str(&copy)]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", str(&copy), str(&model)]);
        assert!(eventually(|| server.connections().0 == 0));
        end(server, disk);
        assert_clean(&image);
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", str(&image), str(&model)]);
    }
}

#[test]
fn block_status_is_that_of_the_image() {
    let scratch = Scratch::new();
    let (image, disk) = qcow2(&scratch, "64M", AioEngine::Auto);
    let (server, uri, _) = serve(&scratch, vec![export("", &disk)], NbdServerOptions::default());
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 1 1M 256k",
            "-c",
            "write -z 10M 64k",
            "-c",
            "write -P 2 63M 1M",
            "-c",
            "discard 63M 512k",
            &uri,
        ],
    );
    let map = |target: &str, format: &str| -> Vec<serde_json::Value> {
        let json = run("qemu-img", &["map", "--output=json", "-f", format, target]);
        serde_json::from_str(&json).expect("JSON")
    };
    // QEMU's client asks with extended headers, libnbd's without.
    let served = map(&uri, "raw");
    let json: Vec<serde_json::Value> =
        serde_json::from_str(&run("nbdinfo", &["--json", "--map", &uri])).expect("JSON");
    end(server, disk);
    let zero_runs = |map: &[serde_json::Value], zero: &dyn Fn(&serde_json::Value) -> bool| {
        let mut runs: Vec<(u64, u64, bool)> = Vec::new();
        for e in map {
            let start =
                e.get("start").or(e.get("offset")).and_then(serde_json::Value::as_u64).expect("start");
            let length = e["length"].as_u64().expect("length");
            match runs.last_mut() {
                Some(last) if last.2 == zero(e) => last.1 += length,
                _ => runs.push((start, length, zero(e))),
            }
        }
        runs
    };
    let flag = |e: &serde_json::Value| e["zero"].as_bool().expect("zero");
    let of_image = zero_runs(&map(str(&image), "qcow2"), &flag);
    assert!(of_image.len() > 3, "{of_image:?}");
    assert_eq!(zero_runs(&served, &flag), of_image);
    let by_type = |e: &serde_json::Value| e["type"].as_u64().expect("type") & 2 != 0;
    assert_eq!(zero_runs(&json, &by_type), of_image);
}

#[test]
fn exports_are_listed_and_found_by_name() {
    let scratch = Scratch::new();
    let (_, one) = qcow2(&scratch, "1M", AioEngine::Auto);
    let raw = scratch.write("two.raw", &[7; 4096]);
    let two = Arc::new(
        Disk::open(
            &raw,
            &OpenOptions { format: terem_block::Format::from_name("raw"), ..OpenOptions::read_only() },
        )
        .expect("opened"),
    );
    let options = NbdServerOptions { connections: 1, ..NbdServerOptions::default() };
    let (server, _, socket) = serve(&scratch, vec![export("one", &one), export("two", &two)], options);
    let at = |name: &str| format!("nbd+unix:///{name}?socket={}", socket.display());
    let list: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", "--list", &at("")])).expect("JSON");
    let exports = list["exports"].as_array().expect("a list");
    assert_eq!(exports.len(), 2);
    for (export, (name, size, read_only)) in
        exports.iter().zip([("one", 1 << 20, false), ("two", 4096, true)])
    {
        assert_eq!(export["export-name"], name);
        assert_eq!(export["description"], format!("the {name} disk"));
        assert_eq!(export["export-size"], size);
        assert_eq!(export["is_read_only"], read_only);
        assert_eq!(export["can_multi_conn"], false);
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    }
    let out = try_run("qemu-io", &["-f", "raw", "-c", "write 0 512", &at("two")]);
    assert!(!out.status.success());
    let out = try_run("qemu-img", &["info", &at("three")]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("there is no export \"three\" here"), "{text}");
    server.stop();
}

/// Speaks the protocol by hand.
struct Client(UnixStream);

impl Client {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("connected");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
        Self(stream)
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the server takes it");
    }

    /// To transmission on the default export, with simple replies.
    fn ready(socket: &Path) -> Self {
        let mut client = Self::connect(socket);
        client.take(18);
        client.send(&3u32.to_be_bytes());
        client.send(b"IHAVEOPT\0\0\0\x01\0\0\0\0");
        client.take(10);
        client
    }

    fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    /// The error and the cookie of a simple reply.
    fn reply(&mut self) -> (u32, u64) {
        let bytes = self.take(16);
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
        let number =
            |range: std::ops::Range<usize>| bytes[range].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        (number(4..8) as u32, number(8..16))
    }

    /// Whether the server hangs up.
    fn is_left(&mut self) -> bool {
        let mut rest = Vec::new();
        !matches!(self.0.read_to_end(&mut rest), Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock))
    }
}

#[test]
fn nonsense_ends_only_the_connection_it_came_on() {
    let scratch = Scratch::new();
    let (_, disk) = qcow2(&scratch, "1M", AioEngine::Auto);
    let (server, _, socket) = serve(&scratch, vec![export("", &disk)], NbdServerOptions::default());
    let mut good = Client::ready(&socket);
    for bad in [
        &b"\xff\xff\xff\xff"[..],
        b"\0\0\0\x03GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff",
    ] {
        let mut client = Client::connect(&socket);
        client.take(18);
        client.send(bad);
        assert!(client.is_left());
    }
    for bad in [vec![0; 28], Client::request(1, 9, 0, 33 << 20)] {
        let mut client = Client::ready(&socket);
        client.send(&bad);
        assert!(client.is_left());
    }
    // Requests that make no sense are answered.
    let mut client = Client::ready(&socket);
    for (command, offset, length, error) in [
        (0, 1 << 20, 1, 22),
        (0, u64::MAX, 512, 22),
        (0, 0, 33 << 20, 22),
        (4, 1 << 20, 1, 22),
        (6, 1 << 20, 1, 28),
        (7, 0, 512, 22),
        (99, 0, 0, 22),
        (3, 0, 0, 0),
        (0, 5, 0, 0),
    ] {
        client.send(&Client::request(command, 77, offset, length));
        assert_eq!(client.reply(), (error, 77), "command {command} {offset:#x}+{length:#x}");
    }
    let mut write = Client::request(1, 78, (1 << 20) - 1, 2);
    write.extend([1, 2]);
    client.send(&write);
    assert_eq!(client.reply(), (28, 78));
    // Half a request, then the client is gone.
    client.send(&Client::request(1, 79, 0, 4096));
    drop(client);
    good.send(&Client::request(0, 1, 0, 4));
    assert_eq!(good.reply(), (0, 1));
    assert_eq!(good.take(4), [0; 4]);
    good.send(&Client::request(2, 1, 0, 0));
    assert!(good.is_left());
    end(server, disk);
}

#[test]
fn who_does_not_read_or_speak_stops_nobody_else() {
    for aio in [AioEngine::IoUring, AioEngine::Threads] {
        let scratch = Scratch::new();
        let (_, disk) = qcow2(&scratch, "64M", aio);
        let options =
            NbdServerOptions { handshake: Duration::from_millis(300), ..NbdServerOptions::default() };
        let (server, uri, socket) = serve(&scratch, vec![export("", &disk)], options);
        // Says nothing at all.
        let mut silent = Client::connect(&socket);
        // Asks for more and more, and never takes a byte of it.
        let mut greedy = Client::ready(&socket);
        greedy.0.set_nonblocking(true).expect("set");
        for cookie in 0..10_000 {
            if greedy.0.write_all(&Client::request(0, cookie, 0, 16 << 20)).is_err() {
                break;
            }
        }
        run("qemu-io", &["-f", "raw", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M", &uri]);
        assert!(silent.is_left());
        assert!(eventually(|| server.connections().0 == 1));
        let begun = Instant::now();
        server.stop();
        assert!(begun.elapsed() < Duration::from_secs(15), "the greedy client holds the server up");
        assert_eq!(read(&disk, 0, 2).expect("still open"), [3, 3]);
    }
}

#[test]
fn a_crowd_that_says_nothing_shuts_nobody_out() {
    let scratch = Scratch::new();
    let (_, disk) = qcow2(&scratch, "1M", AioEngine::Auto);
    let options = NbdServerOptions { handshake: Duration::from_secs(60), ..NbdServerOptions::default() };
    let (server, uri, socket) = serve(&scratch, vec![export("", &disk)], options);
    let crowd: Vec<Client> = (0..200).map(|_| Client::connect(&socket)).collect();
    run("qemu-io", &["-f", "raw", "-c", "read 0 64k", &uri]);
    drop(crowd);
    end(server, disk);
}

#[test]
fn connections_are_limited_and_given_back() {
    let scratch = Scratch::new();
    let (_, disk) = qcow2(&scratch, "1M", AioEngine::Auto);
    let options = NbdServerOptions { connections: 2, ..NbdServerOptions::default() };
    let (server, uri, socket) = serve(&scratch, vec![export("", &disk)], options);
    let (one, two) = (Client::ready(&socket), Client::ready(&socket));
    let out = try_run("qemu-img", &["info", &uri]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("all 2 connections to this export are taken"), "{text}");
    drop((one, two));
    assert!(server.wait_for_last(Duration::from_secs(10)));
    run("qemu-img", &["info", &uri]);
    end(server, disk);
}

#[test]
fn a_killed_client_leaves_what_it_flushed() {
    let scratch = Scratch::new();
    let (image, disk) = qcow2(&scratch, "16M", AioEngine::Auto);
    let (server, uri, _) = serve(&scratch, vec![export("", &disk)], NbdServerOptions::default());
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 9 0 1M", "-c", "flush", "-c", "write -P 8 4M 4M"]);
    let mut io = io.args(["-c", "sleep 60000", &uri]).stdout(Stdio::null()).spawn().expect("qemu-io");
    // Its output comes too late to tell; what it wrote can be seen on the disk.
    while read(&disk, (8 << 20) - 1, 1).expect("read") != [8] {
        std::thread::sleep(Duration::from_millis(5));
    }
    io.kill().expect("killed");
    io.wait().expect("ended");
    assert!(server.wait_for_last(Duration::from_secs(10)));
    assert_eq!(read(&disk, 0, 3).expect("read"), [9; 3]);
    end(server, disk);
    assert_clean(&image);
}
