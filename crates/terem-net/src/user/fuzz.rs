//! A guest that sends anything, for the fuzz target `user_net`.

use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, UdpSocket};

use super::*;
use crate::MAX_FRAME;

/// Where the headers' fields are in a frame without IPv4 options.
const IPV4_TARGET: usize = 30;
const IPV6_TARGET: usize = 38;
const PROTOCOL: usize = 23;
const SEQUENCE: usize = 38;
const ACKNOWLEDGED: usize = 42;

/// Plays `bytes`: frames, each after two bytes of its length and one that says what is put right in it. All of them
/// go to the name server's address, which is a server in here, or lead nowhere: a fuzzer sends no mail.
///
/// # Panics
/// On what must not be.
#[allow(clippy::unwrap_used, reason = "a panic is how a fuzz target fails")]
pub fn play(bytes: &[u8]) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let name_server = server.local_addr().unwrap();
    let datagrams = UdpSocket::bind(name_server).unwrap();
    datagrams.set_nonblocking(true).unwrap();
    let options = UserOptions { forwards: Vec::new(), name_server: Some(name_server) };
    let net = UserNet::start(&options).unwrap();
    let (mut streams, mut buffer) = (Vec::new(), vec![0; MAX_FRAME]);
    let (mut ours, mut theirs) = ([0; 4], [0; 4]);
    let mut rest = bytes;
    for _ in 0..64 {
        let [a, b, how, after @ ..] = rest else { break };
        let length = usize::from(u16::from_be_bytes([*a & 15, *b])).min(after.len());
        let mut frame = after[..length].to_vec();
        rest = &after[length..];
        frame.resize(frame.len().max(54), 0);
        if how & 1 == 0 {
            frame[12..15].copy_from_slice(&[8, 0, 0x45]);
            let total = u16::try_from(frame.len() - MIN_FRAME).unwrap();
            frame[16..18].copy_from_slice(&total.to_be_bytes());
            frame[20..22].fill(0);
            frame[IPV4_TARGET..IPV4_TARGET + 4].copy_from_slice(&DNS.octets());
            frame[36..38].copy_from_slice(&DNS_PORT.to_be_bytes());
        } else if frame[12..14] == [8, 0] {
            frame[14] = frame[14] & 0xf0 | 5;
            frame[IPV4_TARGET..IPV4_TARGET + 4].copy_from_slice(&DNS.octets());
        }
        if frame[12..14] == [0x86, 0xdd] {
            frame[IPV6_TARGET..IPV6_TARGET + 16].copy_from_slice(&DNS6.octets());
        }
        if how & 2 == 0 && frame[PROTOCOL] == TCP {
            frame[SEQUENCE..SEQUENCE + 4].copy_from_slice(&ours);
            frame[ACKNOWLEDGED..ACKNOWLEDGED + 4].copy_from_slice(&theirs);
            frame[46] = frame[46].max(0x50);
        }
        net.set_receive_offloads(if how & 4 == 0 { Offloads::CHECKSUM } else { Offloads::empty() }).unwrap();
        net.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
        while let Some(got) = net.receive(&mut buffer).unwrap() {
            assert!(got.length >= MIN_FRAME && got.length <= MIN_FRAME + usize::from(MTU));
            if got.length >= 54 && buffer[PROTOCOL] == TCP {
                // The next segment of the guest's is one that fits.
                ours.copy_from_slice(&buffer[ACKNOWLEDGED..ACKNOWLEDGED + 4]);
                let sequence = u32::from_be_bytes(buffer[SEQUENCE..SEQUENCE + 4].try_into().unwrap());
                let data = got.length - 34 - usize::from(buffer[46] >> 4) * 4;
                let length = u32::try_from(data).unwrap() + u32::from(buffer[47] & 3 != 0);
                theirs = sequence.wrapping_add(length).to_be_bytes();
            }
        }
        if let Ok((stream, _)) = server.accept() {
            stream.set_nonblocking(true).unwrap();
            streams.push(stream);
        }
        if let Some(stream) = streams.last_mut() {
            let _ = stream.read(&mut buffer);
            if how & 8 != 0 {
                let _ = stream.write(&[*how; 100]);
            }
        }
        if how & 16 != 0 {
            streams.pop();
        }
        if let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(&buffer[..length], from);
        }
    }
}
