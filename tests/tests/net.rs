//! The network: downloads and uploads in user mode and through a tap, a forwarded port.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use terem_tests::{Guest, PATIENCE, alone, run, sha256};

const MIB: usize = 1 << 20;

/// Bytes that no compression or repetition makes easy.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Answers one HTTP request at `address` with `body`.
fn serve(address: &str, body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).unwrap();
        write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(&body).unwrap();
    });
    port
}

/// Takes the bytes of one connection to `address`.
fn receive(address: &str) -> (u16, std::thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let taken = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    });
    (port, taken)
}

fn sha256_of(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    sha256(file.path())
}

#[test]
fn a_hundred_mib_come_in_whole() {
    let _one = alone();
    let body = noise(100 * MIB);
    let sum = sha256_of(&body);
    let words = format!("terem.fetch=http://gateway:{}/file", serve("127.0.0.1", body));
    let ended = Guest::minimal("6.1", "net", &words, &["--net", "user", "--memory", "1G"]).finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("net-bytes"), (100 * MIB).to_string());
    assert_eq!(ended.value("net-sha256"), sum);
}

#[test]
fn an_upload_arrives_whole() {
    let _one = alone();
    let (port, taken) = receive("127.0.0.1");
    let words = format!("terem.mib=100 terem.upload=gateway:{port}");
    let ended = Guest::minimal("6.1", "net", &words, &["--net", "user", "--memory", "1G"]).finish();
    ended.assert_clean(0);
    let bytes = taken.join().unwrap();
    assert_eq!(bytes.len(), 100 * MIB);
    assert_eq!(ended.value("net-upload-sha256"), sha256_of(&bytes));
}

/// A tap of ours, which goes with this value.
struct HostTap(String);

impl HostTap {
    /// The host's address on it.
    const ADDRESS: &str = "10.94.7.1";

    /// With 10.94.7.1/24 on the host, up. None without the right to make one.
    fn make() -> Option<Self> {
        let tap = Self(format!("teremg{}", std::process::id() % 100_000));
        let ip = |words: &[&str]| run(Command::new("ip").args(words)).status.success();
        let made = ip(&["tuntap", "add", "dev", &tap.0, "mode", "tap"]);
        made.then(|| {
            assert!(ip(&["addr", "add", "10.94.7.1/24", "dev", &tap.0]));
            assert!(ip(&["link", "set", &tap.0, "up"]));
            tap
        })
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        let _ = run(Command::new("ip").args(["link", "del", &self.0]));
    }
}

#[test]
fn a_tap_carries_files_both_ways() {
    let _one = alone();
    let Some(tap) = HostTap::make() else {
        eprintln!("no right to make a tap here: this takes root");
        return;
    };
    let body = noise(8 * MIB);
    let sum = sha256_of(&body);
    let (port, (to, taken)) = (serve(HostTap::ADDRESS, body), receive(HostTap::ADDRESS));
    let words = format!(
        "terem.address=10.94.7.2/24 terem.gateway=10.94.7.1 terem.fetch=http://gateway:{port}/file \
         terem.upload=gateway:{to}"
    );
    let net = format!("tap={}", tap.0);
    let ended = Guest::minimal("6.12", "net", &words, &["--net", &net, "--memory", "512M"]).finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("net-sha256"), sum);
    let bytes = taken.join().unwrap();
    assert_eq!(sha256_of(&bytes), sum);
}

#[test]
fn a_forwarded_port_reaches_the_guest() {
    let _one = alone();
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let net = format!("user,forward=tcp:{port}:7777");
    let guest = Guest::minimal("6.12", "listen", "terem.port=7777", &["--net", &net]);
    guest.wait_for("TEREM: listening 7777");
    let sent = noise(200_000);
    let deadline = Instant::now() + PATIENCE;
    // The guest says that it listens just before it does.
    let answer = loop {
        assert!(Instant::now() < deadline, "no answer through the forwarded port");
        std::thread::sleep(Duration::from_millis(300));
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { continue };
        let (mut out, data) = (stream.try_clone().unwrap(), sent.clone());
        let writer = std::thread::spawn(move || {
            let done = out.write_all(&data);
            let _ = out.shutdown(std::net::Shutdown::Write);
            done
        });
        let mut back = Vec::new();
        let read = stream.read_to_end(&mut back);
        let wrote = writer.join().unwrap();
        if read.is_ok() && wrote.is_ok() && !back.is_empty() {
            break back;
        }
    };
    assert!(answer == sent, "{} bytes came back of {}", answer.len(), sent.len());
    guest.finish().assert_clean(0);
}
