//! Frames over a stream socket: each is preceded by its length, 32 bits big-endian (what passt and QEMU's
//! `-netdev stream` speak).
//!
//! Of a frame that arrives in pieces, versions of passt up to 2024 take two at most, and lose their place in the
//! stream for good when there are more, or when a piece ends inside a length (`tap_handler_passt` in its tap.c). So
//! each frame is sent by a call of its own, and only when the socket has room for all of it: the kernel then makes
//! one or two buffers of it, and the next frame starts in a new one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt};

use crate::{MAX_FRAME, Transmit};

const LENGTH_LEN: usize = 4;
/// How much is taken from the socket at once: several of the largest frames.
const RECEIVE_BUFFER: usize = 4 * (MAX_FRAME + LENGTH_LEN);
/// How much the kernel may hold for the peer, in bytes; it gives less where the host's limit is lower. A quarter of
/// it is in use at most, which is when the socket is writable again.
const SEND_BUFFER: usize = 512 << 10;

/// Both directions of the socket, each under its own lock.
#[derive(Debug)]
pub(super) struct FrameStream {
    socket: OwnedFd,
    sending: Mutex<Sending>,
    receiving: Mutex<Receiving>,
    gone: AtomicBool,
}

#[derive(Debug, Default)]
pub(super) struct Sending {
    /// Lengths and frames one after the other.
    bytes: Vec<u8>,
    /// How many of them are sent.
    sent: usize,
    /// Where the frames that are not sent whole end in `bytes`.
    ends: VecDeque<usize>,
}

#[derive(Debug)]
struct Receiving {
    buffer: Box<[u8]>,
    /// What has arrived and is not yet taken is `buffer[start..end]`.
    start: usize,
    end: usize,
}

/// Calls are short and leave the buffers consistent at each step, so a panic elsewhere does not spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FrameStream {
    /// Takes a connected stream socket that does not block.
    pub(super) fn new(socket: OwnedFd) -> Self {
        if let Err(error) = sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER) {
            tracing::debug!(%error, "the socket's buffer stays as it is");
        }
        Self {
            socket,
            sending: Mutex::default(),
            receiving: Mutex::new(Receiving { buffer: vec![0; RECEIVE_BUFFER].into(), start: 0, end: 0 }),
            gone: AtomicBool::new(false),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Has the peer hung up, or broken the protocol?
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Sends what `fill` puts into the given [`Frames`]; it is called only when there is room.
    pub(super) fn send(&self, fill: impl FnOnce(&mut Frames<'_>)) -> io::Result<Transmit> {
        let mut sending = lock(&self.sending);
        self.drain(&mut sending)?;
        if !sending.bytes.is_empty() {
            return Ok(Transmit::Busy);
        }
        fill(&mut Frames(&mut sending));
        self.drain(&mut sending)?;
        Ok(Transmit::Taken)
    }

    pub(super) fn has_unsent(&self) -> bool {
        !lock(&self.sending).bytes.is_empty()
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.drain(&mut lock(&self.sending))
    }

    fn drain(&self, sending: &mut Sending) -> io::Result<()> {
        if self.is_gone() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while let Some(&end) = sending.ends.front() {
            if !self.has_room()? {
                return Ok(());
            }
            let rest = &sending.bytes[sending.sent..end];
            match send(&self.socket, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => sending.sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(self.lost(error.into())),
            }
            if sending.sent == end {
                sending.ends.pop_front();
            }
        }
        sending.bytes.clear();
        sending.sent = 0;
        Ok(())
    }

    /// A socket is writable when three quarters of its buffer are free (`unix_writable` in the kernel's af_unix.c),
    /// which is more than the largest frame also for the smallest usual buffer, 208 KiB.
    fn has_room(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(count) => Ok(count > 0),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Copies the next frame into `frame` and gives its length; frames that do not fit are left out.
    pub(super) fn receive(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let mut receiving = lock(&self.receiving);
        loop {
            if self.is_gone() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match receiving.next() {
                Next::Frame(bytes) => {
                    let Some(target) = frame.get_mut(..bytes.len()) else {
                        tracing::debug!(
                            length = bytes.len(),
                            "dropping a frame that does not fit the buffer"
                        );
                        continue;
                    };
                    target.copy_from_slice(bytes);
                    return Ok(Some(bytes.len()));
                }
                Next::Broken(length) => {
                    let text = format!("a frame of {length} bytes was announced");
                    return Err(self.lost(io::Error::new(io::ErrorKind::InvalidData, text)));
                }
                Next::Incomplete => {}
            }
            receiving.make_room();
            let Receiving { buffer, end, .. } = &mut *receiving;
            match recv(&self.socket, &mut buffer[*end..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
                Ok((count, _)) => *end += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(self.lost(error.into())),
            }
        }
    }

    fn lost(&self, error: io::Error) -> io::Error {
        self.gone.store(true, Ordering::Relaxed);
        error
    }
}

/// Where [`FrameStream::send`] takes its frames.
pub(super) struct Frames<'a>(&'a mut Sending);

impl Frames<'_> {
    pub(super) fn push(&mut self, frame: &[u8]) {
        // The callers' frames are at most MAX_FRAME long.
        let Ok(length) = u32::try_from(frame.len()) else { return };
        self.0.bytes.extend_from_slice(&length.to_be_bytes());
        self.0.bytes.extend_from_slice(frame);
        self.0.ends.push_back(self.0.bytes.len());
    }
}

enum Next<'a> {
    Frame(&'a [u8]),
    Incomplete,
    Broken(usize),
}

impl Receiving {
    fn next(&mut self) -> Next<'_> {
        let waiting = &self.buffer[self.start..self.end];
        let Some((&[a, b, c, d], rest)) = waiting.split_first_chunk::<LENGTH_LEN>() else {
            return Next::Incomplete;
        };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length == 0 || length > MAX_FRAME {
            return Next::Broken(length);
        }
        let Some(frame) = rest.get(..length) else { return Next::Incomplete };
        self.start += LENGTH_LEN + length;
        Next::Frame(frame)
    }

    /// An incomplete frame is at most as long as a quarter of the buffer: moved to the front, it leaves room.
    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() || self.start > self.buffer.len() / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (FrameStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (FrameStream::new(ours.into()), theirs)
    }

    #[test]
    fn frames_arrive_whole_however_they_are_cut() {
        let (stream, mut peer) = pair();
        let mut bytes = Vec::new();
        for length in [14usize, 60, 1514, 65_534] {
            bytes.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
            bytes.extend(vec![u8::try_from(length % 256).unwrap(); length]);
        }
        let mut buffer = vec![0; MAX_FRAME];
        let mut lengths = Vec::new();
        for piece in bytes.chunks(1001) {
            peer.write_all(piece).unwrap();
            while let Some(length) = stream.receive(&mut buffer).unwrap() {
                assert!(buffer[..length].iter().all(|&byte| usize::from(byte) == length % 256));
                lengths.push(length);
            }
        }
        assert_eq!(lengths, [14, 60, 1514, 65_534]);
    }

    #[test]
    fn a_long_run_of_frames_wraps_round_the_buffer() {
        let (stream, mut peer) = pair();
        let writer = std::thread::spawn(move || {
            for number in 0..2000u32 {
                let length = 14 + (number * 7919) % 60_000;
                peer.write_all(&length.to_be_bytes()).unwrap();
                peer.write_all(&vec![number.to_le_bytes()[0]; length as usize]).unwrap();
            }
        });
        let mut buffer = vec![0; MAX_FRAME];
        let mut number = 0u32;
        while number < 2000 {
            match stream.receive(&mut buffer).unwrap() {
                Some(length) => {
                    assert_eq!(length, 14 + ((number * 7919) % 60_000) as usize);
                    assert!(buffer[..length].iter().all(|&byte| byte == number.to_le_bytes()[0]));
                    number += 1;
                }
                None => std::thread::yield_now(),
            }
        }
        writer.join().unwrap();
    }

    #[test]
    fn a_full_socket_is_busy_and_nothing_is_lost() {
        let (stream, mut peer) = pair();
        let mut taken = 0u8;
        while stream.send(|frames| frames.push(&[taken; 60_000])).unwrap() == Transmit::Taken {
            taken += 1;
        }
        assert!(taken > 0);
        assert!(stream.has_unsent());
        for number in 0..taken {
            let mut length = [0; 4];
            // The end of the last frame is still on our side.
            stream.flush().unwrap();
            peer.read_exact(&mut length).unwrap();
            assert_eq!(u32::from_be_bytes(length), 60_000);
            let mut frame = vec![0; 60_000];
            let mut read = 0;
            while read < frame.len() {
                stream.flush().unwrap();
                read += peer.read(&mut frame[read..]).unwrap();
            }
            assert!(frame.iter().all(|&byte| byte == number));
        }
        assert!(!stream.has_unsent());
        assert_eq!(stream.send(|frames| frames.push(&[1; 60])).unwrap(), Transmit::Taken);
    }

    /// What passt does: all that is there is taken, of a frame that is cut there the rest is taken by one call more.
    #[test]
    fn a_frame_comes_in_two_pieces_at_most() {
        let (stream, mut peer) = pair();
        // The kernel doubles it: 208 KiB, what a host with the usual limits has.
        sockopt::set_socket_send_buffer_size(&stream.socket, 104 << 10).unwrap();
        let frames = 3000;
        let reader = std::thread::spawn(move || {
            let (mut buffer, mut seen) = (vec![0; 8 << 20], 0u32);
            while seen < frames {
                let fill = buffer.len() - MAX_FRAME;
                let mut end = peer.read(&mut buffer[..fill]).unwrap();
                let mut at = 0;
                while at < end {
                    assert!(end - at > LENGTH_LEN, "cut inside a length, after {seen} frames");
                    let length = u32::from_be_bytes(buffer[at..at + LENGTH_LEN].try_into().unwrap()) as usize;
                    at += LENGTH_LEN;
                    if at + length > end {
                        end += peer.read(&mut buffer[end..at + length]).unwrap();
                        assert_eq!(end, at + length, "the rest came in pieces, after {seen} frames");
                    }
                    assert!(buffer[at..at + length].iter().all(|&byte| byte == seen.to_le_bytes()[0]));
                    at += length;
                    seen += 1;
                }
                // A peer that is slow now and then, so that the socket fills.
                if seen % 7 == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        });
        let mut number = 0u32;
        while number < frames || stream.has_unsent() {
            let pair =
                [number, number + 1].map(|n| vec![n.to_le_bytes()[0]; 60 + (n as usize * 7919) % 65_475]);
            let sent = stream.send(|into| {
                if number < frames {
                    pair.iter().for_each(|frame| into.push(frame));
                }
            });
            match sent.unwrap() {
                Transmit::Taken => number += 2,
                Transmit::Busy => std::thread::yield_now(),
            }
        }
        reader.join().unwrap();
    }

    #[test]
    fn a_frame_too_long_for_the_buffer_is_left_out() {
        let (stream, mut peer) = pair();
        peer.write_all(&[0, 0, 0, 100]).unwrap();
        peer.write_all(&[1; 100]).unwrap();
        peer.write_all(&[0, 0, 0, 20]).unwrap();
        peer.write_all(&[2; 20]).unwrap();
        let mut buffer = [0; 64];
        assert_eq!(stream.receive(&mut buffer).unwrap(), Some(20));
        assert_eq!(buffer[..20], [2; 20]);
    }

    #[test]
    fn a_peer_that_breaks_the_protocol_or_hangs_up_is_gone() {
        for bytes in [&[0u8, 0, 0, 0][..], &[0xff, 0xff, 0xff, 0xff], &[0, 1, 0, 0x0f]] {
            let (stream, mut peer) = pair();
            peer.write_all(bytes).unwrap();
            let error = stream.receive(&mut [0; 64]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(stream.is_gone());
            assert!(stream.receive(&mut [0; 64]).is_err());
            assert!(stream.send(|_| ()).is_err());
        }
        let (stream, peer) = pair();
        drop(peer);
        assert_eq!(stream.receive(&mut [0; 64]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(stream.is_gone());
    }
}
