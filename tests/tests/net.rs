//! The network in user mode: addresses, a download, an upload, a forwarded port.
//!
//! Uploads of many MiB are broken: 8 MiB arrived whole, of 40 MiB only 15, and with 100 MiB passt reset the
//! connection. Why is not understood yet; the test is there to be switched on.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use terem_tests::{Guest, PATIENCE, alone, sha256};

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

/// Answers one HTTP request with `body`.
fn serve(body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
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

/// Takes one connection's bytes.
fn receive() -> (u16, std::thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
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
    let words = format!("terem.fetch=http://gateway:{}/file", serve(body));
    let ended = Guest::minimal("6.1", "net", &words, &["--net", "user", "--memory", "1G"]).finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("net-bytes"), (100 * MIB).to_string());
    assert_eq!(ended.value("net-sha256"), sum);
}

#[test]
fn an_upload_arrives_whole() {
    let _one = alone();
    let (port, taken) = receive();
    let words = format!("terem.mib=100 terem.upload=gateway:{port}");
    let ended = Guest::minimal("6.1", "net", &words, &["--net", "user", "--memory", "1G"]).finish();
    ended.assert_clean(0);
    let bytes = taken.join().unwrap();
    assert_eq!(bytes.len(), 100 * MIB);
    assert_eq!(ended.value("net-upload-sha256"), sha256_of(&bytes));
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
