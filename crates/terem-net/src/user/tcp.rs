//! TCP: each connection of the guest's ends here, and goes on as a socket of the host.
//!
//! ```text
//!   guest ══frames══ smoltcp (one interface and one socket for each connection) ══bytes══ the host's socket
//! ```
//!
//! An interface for each connection, with the server's address for its own, costs a few hundred bytes and makes
//! finding the socket one look-up of the addresses, however many there are. The guest's SYN is kept until the host's
//! socket is connected, so that the guest sees a refusal as one. Each direction is closed when the other side has
//! closed it; buffers are bounded, and their fill is what the peers see as their windows.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, sockopt};
use rustix::net::{connect, recv, send, shutdown, socket_with};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::GATEWAY_MAC;
use super::context::{Context, Token};
use super::packet::{Packet, TCP, ip_frame, word};
use super::wire::Wire;
use crate::{GATEWAY_ADDRESS, GUEST_ADDRESS};

/// Bytes on the way in each direction of a connection, at most. The kernel gives pages only to what is used.
const BUFFER: usize = 512 << 10;
/// Connections at the same time.
const MAX_CONNECTIONS: usize = 1024;
/// How long a forwarded connection waits for a guest that does not answer.
const GUEST_WAIT: Duration = Duration::from_secs(120);

/// A connection that was not used for so long may go when there are too many.
const IDLE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(600);

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Both ends as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ends {
    guest: SocketAddr,
    server: SocketAddr,
}

struct Connection {
    ends: Ends,
    host: OwnedFd,
    /// None until the host's side is connected.
    stack: Option<Stack>,
    /// The guest's first packet, meanwhile.
    syn: Vec<u8>,
    /// Of the host's socket: there may be something to read, or room to write.
    readable: bool,
    writable: bool,
    /// The host's socket is at its end, and the guest has been told.
    host_ended: bool,
    /// The guest has ended, and the host's socket has been told.
    guest_ended: bool,
    deadline: Option<Instant>,
    /// When the guest was last heard.
    used: Instant,
}

struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
}

/// All connections.
#[derive(Default)]
pub(super) struct Connections {
    all: HashMap<u64, Connection>,
    by_ends: HashMap<Ends, u64>,
    next: u64,
    next_port: u16,
    deadlines: BTreeSet<(Instant, u64)>,
    /// Those that have frames for the guest as soon as there is room for them.
    waiting: VecDeque<u64>,
}

impl Connections {
    /// A packet of the guest's.
    pub(super) fn take(&mut self, packet: &Packet<'_>, context: &mut Context<'_>) {
        let (Some(source), Some(target), Some(&flags)) =
            (word(packet.payload, 0), word(packet.payload, 2), packet.payload.get(13))
        else {
            return;
        };
        let ends =
            Ends { guest: SocketAddr::new(packet.from, source), server: SocketAddr::new(packet.to, target) };
        match self.by_ends.get(&ends).copied() {
            Some(id) if self.all.get(&id).is_some_and(|c| c.stack.is_some()) => {
                self.serve(id, Some(packet.whole), context);
            }
            // Not answered yet: the guest asks again, or gives up.
            Some(id) if flags & RST != 0 => self.remove(id, false),
            Some(_) => {}
            None if flags & (SYN | ACK | RST | FIN) == SYN => self.open(ends, packet, context),
            None if flags & RST == 0 => refuse(ends, packet.payload, context),
            None => {}
        }
    }

    fn open(&mut self, ends: Ends, packet: &Packet<'_>, context: &mut Context<'_>) {
        let host = self.has_room(context.now).then(|| context.host_address(ends.server)).flatten().and_then(
            |address| dial(address).inspect_err(|error| tracing::debug!(%error, %address, "tcp")).ok(),
        );
        let Some(host) = host else {
            refuse(ends, packet.payload, context);
            return;
        };
        let syn = packet.whole.to_vec();
        self.insert(ends, host, syn, None, context);
    }

    /// A connection that the host has accepted on a forwarded port goes on to the guest.
    pub(super) fn forward(&mut self, host: OwnedFd, guest_port: u16, context: &mut Context<'_>) {
        if !self.has_room(context.now) {
            reset(&host);
            return;
        }
        let guest = SocketAddr::new(GUEST_ADDRESS.into(), guest_port);
        let ends = loop {
            // The dynamic ports (RFC 6335, 6); there are more of them than connections.
            self.next_port = self.next_port.wrapping_add(1) | 0xc000;
            let ends = Ends { guest, server: SocketAddr::new(GATEWAY_ADDRESS.into(), self.next_port) };
            if !self.by_ends.contains_key(&ends) {
                break ends;
            }
        };
        let mut stack = Stack::new(ends, context);
        if let Err(error) = stack.connect(ends) {
            tracing::debug!(%error, "a forwarded connection");
            reset(&host);
            return;
        }
        let id = self.insert(ends, host, Vec::new(), Some(stack), context);
        self.serve(id, None, context);
    }

    /// When there are too many, the one goes that the guest has not used for the longest time, if that is a while: a
    /// guest that was reset has forgotten all of its own.
    fn has_room(&mut self, now: Instant) -> bool {
        if self.all.len() < MAX_CONNECTIONS {
            return true;
        }
        let oldest = self.all.iter().min_by_key(|(_, c)| c.used).map(|(&id, c)| (id, c.used));
        match oldest {
            Some((id, used)) if used + IDLE < now => {
                self.remove(id, true);
                true
            }
            _ => false,
        }
    }

    fn insert(
        &mut self,
        ends: Ends,
        host: OwnedFd,
        syn: Vec<u8>,
        stack: Option<Stack>,
        context: &mut Context<'_>,
    ) -> u64 {
        self.next += 1;
        let id = self.next;
        // A socket that cannot be watched says nothing more: the guest's connection comes to nothing by itself.
        context.watch(&host, Token::Tcp(id));
        let connection = Connection {
            ends,
            host,
            stack,
            syn,
            readable: false,
            writable: false,
            host_ended: false,
            guest_ended: false,
            deadline: None,
            used: context.now,
        };
        self.by_ends.insert(ends, id);
        self.all.insert(id, connection);
        id
    }

    /// Something happened at a host's socket.
    pub(super) fn host_event(&mut self, id: u64, context: &mut Context<'_>) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        (connection.readable, connection.writable) = (true, true);
        let mut first = None;
        if connection.stack.is_none() {
            match sockopt::socket_error(&connection.host) {
                Ok(Ok(())) => {}
                _ => {
                    let (ends, syn) = (connection.ends, std::mem::take(&mut connection.syn));
                    self.remove(id, false);
                    if let Some(packet) = parse(&syn) {
                        refuse(ends, packet.payload, context);
                    }
                    return;
                }
            }
            // The first event may be one of a socket that still connects.
            if rustix::net::getpeername(&connection.host).is_err() {
                return;
            }
            let mut stack = Stack::new(connection.ends, context);
            if stack.listen(connection.ends).is_ok() {
                connection.stack = Some(stack);
                first = Some(std::mem::take(&mut connection.syn));
            }
        }
        self.serve(id, first.as_deref(), context);
    }

    /// Those whose time has come.
    pub(super) fn timers(&mut self, context: &mut Context<'_>) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= context.now
        {
            self.deadlines.pop_first();
            if let Some(connection) = self.all.get_mut(&id) {
                connection.deadline = None;
            }
            self.serve(id, None, context);
        }
    }

    /// When [`Self::timers`] is to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// There is room for frames to the guest again.
    pub(super) fn go_on(&mut self, context: &mut Context<'_>) {
        for _ in 0..self.waiting.len() {
            if context.out.is_full() {
                return;
            }
            if let Some(id) = self.waiting.pop_front() {
                self.serve(id, None, context);
            }
        }
    }

    /// Moves what can be moved, both ways.
    fn serve(&mut self, id: u64, packet: Option<&[u8]>, context: &mut Context<'_>) {
        let Some(connection) = self.all.get_mut(&id) else { return };
        if packet.is_some() {
            connection.used = context.now;
        }
        let end = connection.work(packet, context);
        let deadline = match end {
            Some(End::Closed) => return self.remove(id, false),
            Some(End::Reset) => return self.remove(id, true),
            None => connection.next_time(context.now),
        };
        let deadline = if context.out.is_full() {
            if !self.waiting.contains(&id) {
                self.waiting.push_back(id);
            }
            None
        } else {
            // Anything that is due now has been tried: a little later, then.
            deadline.map(|d| d.max(context.now + smoltcp::time::Duration::from_millis(1)))
        };
        if deadline != connection.deadline {
            if let Some(old) = std::mem::replace(&mut connection.deadline, deadline) {
                self.deadlines.remove(&(old, id));
            }
            self.deadlines.extend(deadline.map(|d| (d, id)));
        }
    }

    fn remove(&mut self, id: u64, by_reset: bool) {
        let Some(connection) = self.all.remove(&id) else { return };
        self.by_ends.remove(&connection.ends);
        if let Some(deadline) = connection.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if by_reset {
            reset(&connection.host);
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }
}

/// How a connection ended.
enum End {
    /// Both sides have closed it.
    Closed,
    /// One of them has broken it off.
    Reset,
}

impl Connection {
    fn work(&mut self, mut packet: Option<&[u8]>, context: &mut Context<'_>) -> Option<End> {
        let stack = self.stack.as_mut()?;
        loop {
            stack.poll(packet.take(), context);
            let socket = stack.sockets.get_mut::<Socket<'_>>(stack.handle);
            let mut moved = false;
            // To the host.
            while self.writable && socket.can_recv() {
                let host = self.host.as_fd();
                let sent = socket.recv(|data| {
                    let sent = send(host, data, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                    (*sent.as_ref().unwrap_or(&0), sent)
                });
                match sent {
                    Ok(Ok(_)) => moved = true,
                    Ok(Err(Errno::AGAIN)) => self.writable = false,
                    Ok(Err(Errno::INTR)) => {}
                    _ => return self.abort(context),
                }
            }
            let state = socket.state();
            let guest_done = matches!(
                state,
                State::CloseWait | State::LastAck | State::Closing | State::TimeWait | State::Closed
            ) && socket.recv_queue() == 0;
            let whole = state != State::Closed || self.host_ended;
            if guest_done && whole && !self.guest_ended {
                self.guest_ended = true;
                // It fails for a socket that is broken, which reading from it tells as well.
                let _ = shutdown(&self.host, Shutdown::Write);
            }
            // To the guest.
            while self.readable && !self.host_ended && socket.can_send() {
                let host = self.host.as_fd();
                let received = socket.send(|room| {
                    let received = recv(host, room, RecvFlags::DONTWAIT).map(|(count, _)| count);
                    (*received.as_ref().unwrap_or(&0), received)
                });
                match received {
                    Ok(Ok(0)) => {
                        self.host_ended = true;
                        socket.close();
                        moved = true;
                    }
                    Ok(Ok(_)) => moved = true,
                    Ok(Err(Errno::AGAIN)) => self.readable = false,
                    Ok(Err(Errno::INTR)) => {}
                    _ => return self.abort(context),
                }
            }
            if socket.state() == State::Established && socket.timeout().is_some() {
                socket.set_timeout(None);
            }
            match socket.state() {
                // The guest's last acknowledgement was the last that matters: nothing gets lost on this wire.
                State::Closed | State::TimeWait if self.host_ended && self.guest_ended => {
                    stack.poll(None, context);
                    return Some(End::Closed);
                }
                // Listen: the first packet was no SYN that smoltcp takes.
                State::Closed | State::Listen => return Some(End::Reset),
                _ => {}
            }
            if !moved || context.out.is_full() {
                return None;
            }
        }
    }

    /// The host's side is broken: so is the guest's.
    fn abort(&mut self, context: &mut Context<'_>) -> Option<End> {
        let stack = self.stack.as_mut()?;
        stack.sockets.get_mut::<Socket<'_>>(stack.handle).abort();
        stack.poll(None, context);
        Some(End::Reset)
    }

    fn next_time(&mut self, now: Instant) -> Option<Instant> {
        let stack = self.stack.as_mut()?;
        stack.interface.poll_at(now, &stack.sockets)
    }
}

impl Stack {
    fn new(ends: Ends, context: &mut Context<'_>) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = context.random();
        let mut wire =
            Wire { incoming: None, out: &mut *context.out, guest: context.guest, checksum_agreed: false };
        let mut interface = Interface::new(config, &mut wire, context.now);
        interface.update_ip_addrs(|addresses| {
            // Room for one address at least; with a prefix of no bits, the guest is on the same network.
            let _ = addresses.push(IpCidr::new(ends.server.ip().into(), 0));
        });
        let buffer = || SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self { interface, sockets, handle }
    }

    /// Takes a packet in, and sends what is to be sent. smoltcp sends one segment each time that it is asked.
    fn poll(&mut self, mut packet: Option<&[u8]>, context: &mut Context<'_>) {
        loop {
            let before = context.out.pushed();
            let mut wire = Wire {
                incoming: packet.take(),
                out: &mut *context.out,
                guest: context.guest,
                checksum_agreed: context.checksum_agreed,
            };
            self.interface.poll(context.now, &mut wire, &mut self.sockets);
            if context.out.pushed() == before {
                return;
            }
        }
    }

    fn listen(&mut self, ends: Ends) -> Result<(), smoltcp::socket::tcp::ListenError> {
        self.sockets.get_mut::<Socket<'_>>(self.handle).listen(ends.server)
    }

    fn connect(&mut self, ends: Ends) -> Result<(), smoltcp::socket::tcp::ConnectError> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        socket.set_timeout(Some(GUEST_WAIT.into()));
        socket.connect(self.interface.context(), ends.guest, ends.server)
    }
}

fn parse(packet: &[u8]) -> Option<Packet<'_>> {
    match packet.first()? >> 4 {
        4 => Packet::ipv4(packet),
        _ => Packet::ipv6(packet),
    }
}

/// Starts connecting to `address`.
fn dial(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let host = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&host, true)?;
    match connect(&host, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(host),
        Err(error) => Err(error),
    }
}

/// Lets the peer of the host's socket see a reset, not an end, when it is closed.
fn reset(host: &OwnedFd) {
    let _ = sockopt::set_socket_linger(host, Some(Duration::ZERO));
}

/// Answers a segment that belongs to no connection (RFC 9293, 3.10.7.1).
fn refuse(ends: Ends, segment: &[u8], context: &mut Context<'_>) {
    let (Some(&offset), Some(&flags)) = (segment.get(12), segment.get(13)) else { return };
    let number = |at: usize| segment[at..at + 4].try_into().map_or(0, u32::from_be_bytes);
    let data = segment.len().saturating_sub(usize::from(offset >> 4) * 4);
    let length = u32::try_from(data).unwrap_or(0) + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let (sequence, acknowledged, answer) = match flags & ACK {
        0 => (0, number(4).wrapping_add(length), RST | ACK),
        _ => (number(8), 0, RST),
    };
    let mut reply = Vec::with_capacity(20);
    reply.extend_from_slice(&ends.server.port().to_be_bytes());
    reply.extend_from_slice(&ends.guest.port().to_be_bytes());
    reply.extend_from_slice(&sequence.to_be_bytes());
    reply.extend_from_slice(&acknowledged.to_be_bytes());
    reply.extend_from_slice(&[0x50, answer, 0, 0, 0, 0, 0, 0]);
    let addresses: (IpAddr, IpAddr) = (ends.server.ip(), ends.guest.ip());
    if let Some(frame) = ip_frame((context.guest, GATEWAY_MAC), addresses, TCP, None, &reply) {
        context.out.push(frame);
    }
}
