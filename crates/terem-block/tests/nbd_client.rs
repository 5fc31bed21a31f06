//! The NBD client against QEMU's and nbdkit's servers and our own, also when they die.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::fmt::Write as _;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use peer::{Model, Random, Scratch, assert_clean, options, read, run, str, write};
use terem_block::{
    AioEngine, BackingPolicy, BlockBackend, CreateOptions, Disk, Format, NbdExport, NbdListener, NbdServer,
    NbdServerOptions, NbdServerTls, Op, OpenError, OpenOptions, Request,
};

const QCOW2: &str = "disk.qcow2";

/// A server that is killed when this goes.
struct Peer(Child);

impl Peer {
    /// Starts `tool`, and waits for its socket.
    fn start(tool: &str, args: &[&str], socket: &Path) -> Self {
        let child = Command::new(tool)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{tool} is needed for this test: {e}"));
        let peer = Self(child);
        let there = (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            socket.exists()
        });
        assert!(there, "{tool} makes no socket");
        peer
    }

    fn qemu_nbd(image: &Path, socket: &Path) -> Self {
        Self::start("qemu-nbd", &["-t", "-f", "qcow2", "-e", "4", "-k", str(socket), str(image)], socket)
    }

    fn nbdkit(args: &[&str], socket: &Path) -> Self {
        let args = [&["-f", "-U", str(socket)], args].concat();
        Self::start("nbdkit", &args, socket)
    }

    fn kill(mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("ended");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn at(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn image(scratch: &Scratch, size: &str) -> PathBuf {
    let image = scratch.path(QCOW2);
    run("qemu-img", &["create", "-q", "-f", "qcow2", str(&image), size]);
    image
}

/// Random requests through `uri`, checked against a model; then the model.
fn exercise(uri: &str, aio: AioEngine, size: usize, seed: u64, steps: usize) -> Model {
    let disk = Disk::open(uri, &options(aio)).expect("opened");
    assert_eq!(disk.size(), size as u64);
    let mut model = Model(vec![0; size]);
    let mut random = Random(seed);
    for _ in 0..steps {
        model.step(&disk, &mut random, 64 << 10);
    }
    model.assert_equals(&disk);
    disk.close().expect("closed");
    model
}

#[test]
fn qemu_nbd_serves_us() {
    for (seed, aio) in [(1, AioEngine::IoUring), (2, AioEngine::Threads)] {
        let scratch = Scratch::new();
        let (image, socket) = (image(&scratch, "4M"), scratch.path("socket"));
        let server = Peer::qemu_nbd(&image, &socket);
        let model = exercise(&at(&socket), aio, 4 << 20, seed, 300);
        // Its own end makes it close the image; SIGTERM would do as well.
        let disk = Disk::open(at(&socket), &options(aio)).expect("opened");
        disk.run(Op::Flush).expect("flushed");
        drop(disk);
        server.kill();
        model.assert_qemu_reads(&scratch, &image);
    }
}

#[test]
fn servers_that_can_little_do() {
    for filters in [
        &["memory", "4M"][..],
        &[
            "--filter=blocksize-policy",
            "memory",
            "4M",
            "blocksize-minimum=4096",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
        &["--no-sr", "memory", "4M"],
        &["--filter=nozero", "memory", "4M"],
        &["--filter=noextents", "--filter=fua", "memory", "4M", "fuamode=emulate"],
    ] {
        let scratch = Scratch::new();
        let socket = scratch.path("socket");
        let _server = Peer::nbdkit(filters, &socket);
        exercise(&at(&socket), AioEngine::Auto, 4 << 20, 7, 100);
    }
}

#[test]
fn a_server_of_ours_serves_us_many_requests_at_once() {
    let scratch = Scratch::new();
    let (image, socket) = (image(&scratch, "64M"), scratch.path("socket"));
    let served = Arc::new(Disk::open(&image, &OpenOptions::default()).expect("opened"));
    let listener = UnixListener::bind(&socket).expect("a socket");
    let exports =
        vec![NbdExport { name: "a b".into(), description: String::new(), disk: Arc::clone(&served) }];
    let server = NbdServer::start(exports, vec![NbdListener::Unix(listener)], NbdServerOptions::default())
        .expect("started");
    let uri = format!("nbd+unix:///a%20b?socket={}", socket.display());
    exercise(&uri, AioEngine::Auto, 64 << 20, 3, 100);
    let disk = Disk::open(&uri, &OpenOptions::default()).expect("opened");
    let (tell, told) = std::sync::mpsc::channel();
    for i in 0..2000u64 {
        let tell = tell.clone();
        let memory = Arc::new(terem_block::AlignedBuffer::from_slice(&[i as u8; 8192]));
        disk.submit(Request::new(Op::Write { offset: i * 8192, memory }, move |result| {
            tell.send(result).expect("told");
        }));
    }
    for _ in 0..2000 {
        told.recv().expect("told").expect("written");
    }
    for i in [0, 1, 999, 1999u64] {
        assert_eq!(read(&disk, i * 8192 + 5, 2).expect("read"), [i as u8; 2]);
    }
    disk.run(Op::Discard { offset: 0, length: 64 << 20 }).expect("discarded");
    let extents = disk.block_status(0, 64 << 20).expect("status");
    assert!(extents.len() == 1 && extents[0].is_zero(), "{extents:?}");
    disk.close().expect("closed");
    server.stop();
    Arc::into_inner(served).expect("ours alone").close().expect("closed");
    assert_clean(&image);
}

#[test]
fn disks_convert_to_and_from_exports() {
    let scratch = Scratch::new();
    let mut bytes = Random(5).bytes(3 << 20);
    bytes[1 << 20..2 << 20].fill(0);
    let (raw, socket) = (scratch.write("a.raw", &bytes), scratch.path("socket"));
    let image = image(&scratch, "3M");
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 3M", str(&image)]);
    let server = Peer::qemu_nbd(&image, &socket);
    let (uri, raw_format) = (at(&socket), Format::from_name("raw").expect("there"));
    let to = CreateOptions { format: raw_format, ..CreateOptions::default() };
    let convert = |from: &str, to: &str, options: &CreateOptions| {
        terem_block::convert(
            from,
            &OpenOptions::read_only(),
            to,
            options,
            &terem_block::ConvertOptions::default(),
            &mut |_, _| true,
        )
    };
    let error = convert(str(&raw), &uri, &to).expect_err("it is there");
    assert!(matches!(error, OpenError::Exists { .. }), "{error}");
    convert(str(&raw), &uri, &CreateOptions { overwrite: true, ..to.clone() }).expect("converted");
    let back = scratch.path("back.qcow2");
    convert(&uri, str(&back), &CreateOptions::default()).expect("converted");
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", str(&raw), str(&back)]);
    assert_eq!(terem_block::info(&uri, None).expect("info").virtual_size, 3 << 20);
    drop(server);
    assert_clean(&back);
}

#[test]
fn an_export_backs_an_image_only_where_that_is_allowed() {
    let scratch = Scratch::new();
    let (base, socket, top) = (image(&scratch, "1M"), scratch.path("socket"), scratch.path("top.qcow2"));
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", str(&base)]);
    let _server = Peer::qemu_nbd(&base, &socket);
    let uri = at(&socket);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", str(&top)]);
    let open = |backing| Disk::open(&top, &OpenOptions { backing, ..OpenOptions::default() });
    let error = open(BackingPolicy::SameDirectory).expect_err("not allowed");
    assert!(matches!(error, OpenError::BackingRefused { .. }), "{error}");
    assert!(open(BackingPolicy::Allow(vec!["nbd://else/".into()])).is_err());
    let disk = open(BackingPolicy::Allow(vec![uri.into()])).expect("allowed");
    write(&disk, 100, &[1, 2]).expect("written");
    assert_eq!(read(&disk, 99, 4).expect("read"), [5, 1, 2, 5]);
    disk.close().expect("closed");
}

#[test]
fn a_killed_server_fails_requests_or_is_awaited() {
    let scratch = Scratch::new();
    let (image, socket) = (image(&scratch, "4M"), scratch.path("socket"));
    let server = Peer::qemu_nbd(&image, &socket);
    let plain = Disk::open(at(&socket), &options(AioEngine::Auto)).expect("opened");
    let patient = format!("{}&reconnect-delay=60", at(&socket));
    let patient = Arc::new(Disk::open(&patient, &options(AioEngine::Auto)).expect("opened"));
    write(&patient, 0, &[1; 4096]).expect("written");
    write(&plain, 8192, &[2; 4096]).expect("written");
    server.kill();
    let error = read(&plain, 0, 512).expect_err("the server is gone");
    assert!(error.to_string().contains("gone") || error.to_string().contains("broke"), "{error}");
    plain.close().expect_err("not flushed");
    // Requests wait while it is away.
    let writers: Vec<_> = (0..8u8)
        .map(|i| {
            let disk = Arc::clone(&patient);
            std::thread::spawn(move || write(&disk, 65536 + u64::from(i) * 4096, &[i + 10; 4096]))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(50));
    std::fs::remove_file(&socket).expect("removed");
    let server = Peer::qemu_nbd(&image, &socket);
    for writer in writers {
        writer.join().expect("joined").expect("written in the end");
    }
    for i in 0..8u8 {
        assert_eq!(read(&patient, 65536 + u64::from(i) * 4096, 1).expect("read"), [i + 10]);
    }
    // An export of another size is another disk.
    server.kill();
    std::fs::remove_file(&socket).expect("removed");
    let _server = Peer::nbdkit(&["memory", "8M"], &socket);
    let error = read(&patient, 0, 512).expect_err("another disk");
    assert!(error.to_string().contains("another"), "{error}");
}

#[test]
fn errors_say_what_and_why() {
    let scratch = Scratch::new();
    let socket = scratch.path("socket");
    let _server = Peer::nbdkit(&["-r", "--exportname=x", "memory", "1M"], &socket);
    let open = |uri: &str, options: &OpenOptions| Disk::open(uri, options).expect_err(uri).to_string();
    let fails = |uri: &str| open(uri, &OpenOptions::default());
    let read_only = fails(&at(&socket));
    assert!(read_only.contains("readonly=on"), "{read_only}");
    assert!(Disk::open(at(&socket), &OpenOptions::read_only()).is_ok());
    let away = fails("nbd+unix:///?socket=/nowhere");
    assert!(away.contains("no such socket"), "{away}");
    let none = fails("nbd://127.0.0.1:1/");
    assert!(none.contains("nobody listens"), "{none}");
    let tls = fails(&at(&socket).replace("nbd+unix", "nbds+unix"));
    assert!(tls.contains("TLS"), "{tls}");
    let format = Format::from_name("qcow2");
    let qcow2 = open(&at(&socket), &OpenOptions { format, ..OpenOptions::read_only() });
    assert!(qcow2.contains("over NBD"), "{qcow2}");
    let nbd = scratch.path("nonsense");
    let listener = UnixListener::bind(&nbd).expect("a socket");
    let fake = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().expect("accepted");
        peer.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n").expect("written");
    });
    let nonsense = fails(&at(&nbd));
    assert!(nonsense.contains("not NBD's"), "{nonsense}");
    fake.join().expect("joined");
}

/// A certificate authority, and certificates for a server and a client, in `directory`.
fn certificates(directory: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    std::fs::create_dir_all(directory).expect("created");
    let put = |name: &str, text: String| std::fs::write(directory.join(name), text).expect("written");
    let key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(Vec::<String>::new()).expect("good");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    put("ca-cert.pem", authority.self_signed(&key).expect("signed").pem());
    let issuer = Issuer::new(authority, key);
    for (who, usage) in [
        ("server", rcgen::ExtendedKeyUsagePurpose::ServerAuth),
        ("client", rcgen::ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec!["localhost".into()]).expect("good");
        params.key_usages =
            vec![rcgen::KeyUsagePurpose::DigitalSignature, rcgen::KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        put(&format!("{who}-cert.pem"), params.signed_by(&key, &issuer).expect("signed").pem());
        put(&format!("{who}-key.pem"), key.serialize_pem());
    }
}

#[test]
fn tls_between_us_and_peers_both_ways() {
    let scratch = Scratch::new();
    let (pki, image, socket) = (scratch.path("pki"), image(&scratch, "4M"), scratch.path("socket"));
    certificates(&pki);
    let strangers = scratch.path("strangers");
    certificates(&strangers);
    let uri =
        |pki: &Path| format!("nbds+unix:///?socket={}&tls-certificates={}", socket.display(), pki.display());

    // Our server.
    let served = Arc::new(Disk::open(&image, &OpenOptions::default()).expect("opened"));
    let exports =
        vec![NbdExport { name: String::new(), description: String::new(), disk: Arc::clone(&served) }];
    let listener = UnixListener::bind(&socket).expect("a socket");
    let tls = Some(NbdServerTls::load(&pki, true).expect("certificates"));
    let server_options = NbdServerOptions { tls, ..NbdServerOptions::default() };
    let server =
        NbdServer::start(exports, vec![NbdListener::Unix(listener)], server_options).expect("started");
    let mut commands = String::new();
    for i in 1..64u32 {
        let _ = writeln!(commands, "write -P {i} {} 60k", i * 64 * 1024 - 1000);
    }
    let arguments: Vec<&str> = commands.lines().flat_map(|line| ["-c", line]).collect();
    let creds = format!("tls-creds-x509,id=t,endpoint=client,dir={}", pki.display());
    let target = format!(
        "driver=nbd,server.type=unix,server.path={},tls-creds=t,tls-hostname=localhost",
        socket.display()
    );
    let base = ["--object", creds.as_str(), "--image-opts"];
    run("qemu-io", &[&base[..], &arguments, &["-c", "flush", target.as_str()]].concat());
    let disk = Disk::open(uri(&pki), &OpenOptions::default()).expect("opened");
    assert_eq!(read(&disk, 64 * 1024 - 1001, 2).expect("read"), [0, 1]);
    assert_eq!(read(&disk, 63 * 64 * 1024 - 1000, 2).expect("read"), [63, 63]);
    let big = Random(9).bytes(3 << 20);
    write(&disk, 12345, &big).expect("written");
    assert!(read(&disk, 12345, big.len()).expect("read") == big);
    disk.close().expect("closed");
    run("nbdcopy", &[&uri(&pki), str(&scratch.path("copy.raw"))]);
    let copy = std::fs::read(scratch.path("copy.raw")).expect("read");
    assert!(copy[12345..12345 + big.len()] == big);
    for (who, uri) in [("a stranger", uri(&strangers)), ("without TLS", at(&socket))] {
        let error = Disk::open(&uri, &OpenOptions::default()).expect_err(who).to_string();
        assert!(error.contains("TLS"), "{who}: {error}");
    }
    std::fs::remove_file(pki.join("client-cert.pem")).expect("removed");
    Disk::open(uri(&pki), &OpenOptions::default()).expect_err("without a certificate of ours");
    server.stop();
    Arc::into_inner(served).expect("ours alone").close().expect("closed");

    // Theirs.
    for tool in ["qemu-nbd", "nbdkit"] {
        let _ = std::fs::remove_file(&socket);
        let dir = pki.display();
        let _server = match tool {
            "nbdkit" => Peer::nbdkit(
                &["--tls=require", &format!("--tls-certificates={dir}"), "memory", "4M"],
                &socket,
            ),
            _ => {
                let creds = format!("tls-creds-x509,id=t,endpoint=server,dir={dir},verify-peer=no");
                let (socket_text, image) = (str(&socket), str(&image));
                Peer::start(
                    tool,
                    &["-t", "--object", &creds, "--tls-creds", "t", "-f", "qcow2", "-k", socket_text, image],
                    &socket,
                )
            }
        };
        let disk = Disk::open(uri(&pki), &OpenOptions::default()).expect(tool);
        write(&disk, 777, &big).expect("written");
        assert!(read(&disk, 777, big.len()).expect("read") == big, "{tool}");
        disk.close().expect("closed");
        Disk::open(uri(&strangers), &OpenOptions::default()).expect_err("another authority");
    }
}
