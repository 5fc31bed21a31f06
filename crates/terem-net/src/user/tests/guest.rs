//! A guest with a TCP/IP stack of its own: smoltcp, at the other end of the frames.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::*;

struct Guest<'a> {
    net: &'a UserNet,
    interface: Interface,
    sockets: SocketSet<'static>,
    card: Card<'a>,
    began: Instant,
}

struct Card<'a> {
    net: &'a UserNet,
    received: VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
    /// Takes no frames.
    deaf: bool,
}

struct Frame(Vec<u8>);
struct Sender<'a>(&'a UserNet);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0[MIN_FRAME..])
    }
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = packet::ethernet(GATEWAY_MAC, GUEST_MAC, ETHER_IPV4, len);
        frame.resize(MIN_FRAME + len, 0);
        let result = f(&mut frame[MIN_FRAME..]);
        send(self.0, &frame);
        result
    }
}

impl Device for Card<'_> {
    type RxToken<'a>
        = Frame
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Frame, Sender<'_>)> {
        if self.deaf {
            return None;
        }
        while let Some(received) = self.net.receive(&mut self.buffer).unwrap() {
            self.received.push_back(self.buffer[..received.length].to_vec());
            if self.received.len() >= 32 {
                break;
            }
        }
        Some((Frame(self.received.pop_front()?), Sender(self.net)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sender<'_>> {
        Some(Sender(self.net))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        if self.net.receive_offloads().contains(Offloads::CHECKSUM) && lock(&self.net.inner).checksum_agreed {
            capabilities.checksum = smoltcp::phy::ChecksumCapabilities::ignored();
        }
        capabilities
    }
}

impl<'a> Guest<'a> {
    fn new(net: &'a UserNet) -> Self {
        let mut card = Card { net, received: VecDeque::new(), buffer: vec![0; MAX_FRAME], deaf: false };
        let now = smoltcp::time::Instant::from_micros(0);
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut card, now);
        interface.update_ip_addrs(|a| a.push(IpCidr::new(IpAddr::from(GUEST_ADDRESS).into(), 0)).unwrap());
        // Where the guest is, is known from its frames.
        send(net, &ipv4(UDP, GUEST_ADDRESS, GATEWAY_ADDRESS, &udp_payload(9, 9, b"")));
        Self { net, interface, sockets: SocketSet::new(Vec::new()), card, began: Instant::now() }
    }

    fn socket() -> Socket<'static> {
        let buffer = || SocketBuffer::new(vec![0; 1 << 20]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket
    }

    fn connect(&mut self, port: u16, from: u16) -> SocketHandle {
        let mut socket = Self::socket();
        socket.connect(self.interface.context(), (IpAddr::from(GATEWAY_ADDRESS), port), from).unwrap();
        self.sockets.add(socket)
    }

    fn listen(&mut self, port: u16) -> SocketHandle {
        let mut socket = Self::socket();
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    fn tcp(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn poll(&mut self) {
        let now =
            smoltcp::time::Instant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap());
        // One segment each time.
        for _ in 0..16 {
            self.interface.poll(now, &mut self.card, &mut self.sockets);
        }
    }

    /// Polls until `done` gives something.
    fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(Instant::now() < end, "it does not come to its end");
            if self.card.received.is_empty() {
                wait_readable(self.net, Duration::from_millis(1));
            }
        }
    }
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Sends everything, ends, and reads what comes back to its end.
fn exchange(guest: &mut Guest<'_>, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
    let (mut sent, mut back) = (0, Vec::new());
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        while sent < data.len() && socket.can_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        if sent == data.len() && socket.state() == State::Established {
            socket.close();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
        }
        let ended = !matches!(
            socket.state(),
            State::SynSent | State::Established | State::FinWait1 | State::FinWait2
        );
        (sent == data.len() && ended && !socket.may_recv()).then_some(())
    });
    back
}

#[test]
fn an_upload_and_a_download_arrive_whole() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let data = noise(64 << 20);
    let body = data.clone();
    let host = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut bytes = Vec::new();
        // The guest's end first, then the answer: both directions end by themselves.
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&body).unwrap();
        bytes
    });
    let net = start(Vec::new());
    let mut guest = Guest::new(&net);
    let handle = guest.connect(port, 50_000);
    let back = exchange(&mut guest, handle, &data);
    assert!(host.join().unwrap() == data, "the upload");
    assert!(back == data, "the download");
    guest.until(|_| (lock(&net.inner).connections.count() == 0).then_some(()));
}

#[test]
fn the_host_may_end_first_and_still_listen() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let host = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.write_all(b"that is all").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let net = start(Vec::new());
    let mut guest = Guest::new(&net);
    let handle = guest.connect(port, 50_000);
    guest.until(|guest| (guest.tcp(handle).state() == State::CloseWait).then_some(()));
    let data = noise(3 << 20);
    let mut sent = 0;
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        while sent < data.len() && socket.can_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        (sent == data.len()).then(|| socket.close())
    });
    guest.until(|guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
    assert!(host.join().unwrap() == data);
    guest.until(|_| (lock(&net.inner).connections.count() == 0).then_some(()));
}

#[test]
fn a_hundred_connections_at_once() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let host = std::thread::spawn(move || {
        let streams: Vec<TcpStream> = (0..100).map(|_| server.accept().unwrap().0).collect();
        for mut stream in streams {
            let mut number = [0; 2];
            stream.read_exact(&mut number).unwrap();
            stream.write_all(&noise(1000 + usize::from(u16::from_be_bytes(number)))).unwrap();
        }
    });
    let net = start(Vec::new());
    let mut guest = Guest::new(&net);
    let handles: Vec<_> = (0..100).map(|n| guest.connect(port, 50_000 + n)).collect();
    for (number, &handle) in (0_u16..).zip(&handles) {
        guest.until(|guest| guest.tcp(handle).can_send().then_some(()));
        guest.tcp(handle).send_slice(&number.to_be_bytes()).unwrap();
    }
    for (number, handle) in handles.into_iter().enumerate() {
        let back = guest.until(|guest| {
            let socket = guest.tcp(handle);
            (socket.recv_queue() >= 1000 + number).then(|| socket.recv(|b| (b.len(), b.to_vec())).unwrap())
        });
        assert!(back == noise(1000 + number), "{number}");
    }
    host.join().unwrap();
}

#[test]
fn a_forward_carries_both_ways_and_a_refusal() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let forward = |host_port, guest_port| Forward {
        protocol: Protocol::Tcp,
        address: Some(Ipv4Addr::LOCALHOST.into()),
        host_port,
        guest_port,
    };
    let other = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let net = start(vec![forward(free, 22), forward(other, 23)]);
    let mut guest = Guest::new(&net);
    let handle = guest.listen(22);
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", free)).unwrap();
        stream.write_all(b"from the host").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let mut refused = TcpStream::connect(("127.0.0.1", other)).unwrap();
        let error = refused.read(&mut [0; 1]).unwrap_err().kind();
        (bytes, error)
    });
    guest.until(|guest| (guest.tcp(handle).recv_queue() == 13).then_some(()));
    assert_eq!(guest.tcp(handle).remote_endpoint().unwrap().addr, IpAddr::from(GATEWAY_ADDRESS).into());
    let data = noise(1 << 20);
    let mut sent = 0;
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        sent += socket.send_slice(&data[sent..]).unwrap();
        (sent == data.len()).then(|| socket.close())
    });
    guest.until(|_| client.is_finished().then_some(()));
    let (bytes, refused) = client.join().unwrap();
    assert!(bytes == data);
    assert_eq!(refused, io::ErrorKind::ConnectionReset);
}

#[test]
fn a_download_that_nobody_reads_is_bounded_and_keeps_quiet() {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        while stream.write_all(&[7; 65_536]).is_ok() {
            WRITTEN.fetch_add(65_536, Ordering::Relaxed);
        }
    });
    let net = start(Vec::new());
    let mut guest = Guest::new(&net);
    let handle = guest.connect(port, 50_000);
    guest.until(|guest| (guest.tcp(handle).recv_queue() > 500_000).then_some(()));
    // The guest's card takes no frames any more: they wait, but not many, and nothing wakes anybody.
    guest.card.deaf = true;
    std::thread::sleep(Duration::from_millis(200));
    let mut wakeups = 0;
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        if wait_readable(&net, Duration::from_millis(50)) {
            wakeups += 1;
            // As a device without buffers would, once woken: one frame at most is taken.
            lock(&net.inner).host_events(&net.epoll).unwrap();
        }
    }
    assert!(wakeups < 40, "{wakeups} wakeups for nothing");
    assert!(lock(&net.inner).out.bytes() < 3 << 20);
    let before = WRITTEN.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(WRITTEN.load(Ordering::Relaxed), before, "the server is held back");
    // And it goes on.
    guest.card.deaf = false;
    let mut read = 0;
    guest.until(|guest| {
        read += guest.tcp(handle).recv(|bytes| (bytes.len(), bytes.len())).unwrap_or(0);
        (read > before).then_some(())
    });
}

#[test]
#[ignore = "a measurement"]
fn throughput() {
    const BYTES: usize = 2 << 30;
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut bytes = vec![0; 1 << 20];
        while stream.read(&mut bytes).unwrap() > 0 {}
        for _ in 0..BYTES / bytes.len() {
            stream.write_all(&bytes).unwrap();
        }
    });
    let net = start(Vec::new());
    net.set_receive_offloads(Offloads::CHECKSUM).unwrap();
    let mut guest = Guest::new(&net);
    let handle = guest.connect(port, 50_000);
    let piece = vec![1; 1 << 20];
    let (mut sent, mut received) = (0, 0);
    let began = Instant::now();
    guest.until(|guest| {
        while sent < BYTES && guest.tcp(handle).can_send() {
            sent += guest.tcp(handle).send_slice(&piece[..piece.len().min(BYTES - sent)]).unwrap();
        }
        (sent == BYTES).then(|| guest.tcp(handle).close())
    });
    let up = began.elapsed();
    guest.until(|guest| {
        received += guest.tcp(handle).recv(|bytes| (bytes.len(), bytes.len())).unwrap_or(0);
        (received == BYTES).then_some(())
    });
    let gbit = |time: Duration| (BYTES * 8) as f64 / time.as_secs_f64() / 1e9;
    println!("2 GiB: up {:.1} Gbit/s, down {:.1} Gbit/s", gbit(up), gbit(began.elapsed() - up));
}
