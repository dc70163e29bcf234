//! How connections come to be and end, in good order and in bad.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use super::super::connections::{NARROW_WINDOW, WIDE_CONNECTIONS, WIDE_WINDOW};
use super::super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::driver::{Guest, read_available};

const PORT: u32 = 1024;

#[test]
fn host_client_is_accepted_and_leaves() {
    let mut guest = Guest::new(16);
    let (client, host) = guest.connected_client(PORT);
    drop(client);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    assert_eq!(guest.connections(), 1, "the ports stay taken until the guest confirms");
    guest.control(Op::Reset, PORT, host);
    guest.expect_nothing();
    guest.assert_clean();
}

#[test]
fn refused_client_sees_the_end_and_no_word() {
    let mut guest = Guest::new(16);
    let mut client = guest.client(b"CONNECT 9\n");
    let request = guest.expect(Op::Request);
    assert_eq!(request.dst_port, 9);
    guest.control(Op::Reset, 9, request.src_port);
    guest.expect_nothing();
    assert_eq!(read_available(&mut client), (vec![], true));
    guest.assert_clean();
}

#[test]
fn client_of_a_guest_that_has_no_buffers_yet_is_served_later() {
    let mut guest = Guest::new(0);
    let mut client = guest.client(b"CONNECT 1024\n");
    guest.expect_nothing();
    assert_eq!(read_available(&mut client), (vec![], false));
    guest.lend(0, 3776);
    guest.expect(Op::Request);
}

#[test]
fn line_may_come_in_pieces_with_bytes_behind_it() {
    let mut guest = Guest::new(16);
    let mut client = guest.client(b"CONN");
    guest.expect_nothing();
    client.write_all(b"ECT 1024\nhello").unwrap();
    let host = guest.expect(Op::Request).src_port;
    guest.control(Op::Response, PORT, host);
    guest.settle();
    let (header, payload) = guest.received.pop_front().unwrap();
    assert_eq!((Op::from_wire(header.op), payload.as_slice()), (Some(Op::Data), &b"hello"[..]));
}

#[test]
fn malformed_and_unfinished_lines_are_closed_without_a_packet() {
    let mut guest = Guest::new(16);
    for line in [&b"GET / HTTP/1.1\r\n"[..], b"CONNECT\n", b"CONNECT 99999999999\n", &[0; 64]] {
        let mut client = guest.client(line);
        guest.expect_nothing();
        assert_eq!(read_available(&mut client), (vec![], true), "{}", line.escape_ascii());
    }
    let client = guest.client(b"CONNECT 10");
    guest.expect_nothing();
    assert_eq!(guest.worker.waiting_clients(), 1);
    drop(client);
    guest.expect_nothing();
    assert_eq!(guest.worker.waiting_clients(), 0);
    guest.assert_clean();
}

#[test]
fn guest_reaches_a_service_and_only_what_listens() {
    let mut guest = Guest::new(16);
    guest.control(Op::Request, 7, PORT);
    guest.expect(Op::Reset);
    guest.assert_clean();
    let mut service = guest.connected_service(7, PORT);
    guest.data(7, PORT, b"question");
    guest.settle();
    assert_eq!(read_available(&mut service).0, b"question");
    guest.control(Op::Reset, 7, PORT);
    guest.expect_nothing();
    assert_eq!(read_available(&mut service), (vec![], true));
    guest.assert_clean();
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new(16);
    let (mut client, host) = guest.connected_client(PORT);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.data(PORT, host, b"answer");
    guest.shutdown(PORT, host, SHUTDOWN_SEND);
    guest.settle();
    assert_eq!(read_available(&mut client), (b"answer".to_vec(), true));
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    guest.control(Op::Reset, PORT, host);
    guest.expect_nothing();
    guest.assert_clean();
}

#[test]
fn guest_that_will_not_read_ends_the_writer() {
    let mut guest = Guest::new(16);
    let (mut client, host) = guest.connected_client(PORT);
    guest.shutdown(PORT, host, SHUTDOWN_RECEIVE);
    guest.settle();
    // The read side of the host's socket is shut, which the writer learns as a broken pipe.
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn guest_that_ends_all_is_confirmed_and_its_last_bytes_arrive() {
    let mut guest = Guest::new(16);
    let (mut client, host) = guest.connected_client(PORT);
    guest.data(PORT, host, b"last words");
    guest.shutdown(PORT, host, SHUTDOWN_BOTH);
    guest.expect(Op::Reset);
    assert_eq!(read_available(&mut client), (b"last words".to_vec(), true));
    guest.expect_nothing();
    guest.assert_clean();
}

#[test]
fn reset_of_the_device_closes_everything_and_serves_anew() {
    let mut guest = Guest::new(16);
    let (mut client, _) = guest.connected_client(PORT);
    let mut waiting = guest.client(b"CONNECT 5");
    guest.settle();
    guest.restart(16);
    assert_eq!(read_available(&mut client), (vec![], true));
    assert_eq!(read_available(&mut waiting), (vec![], true));
    guest.assert_clean();
    guest.connected_client(PORT);
}

#[test]
fn hundred_connections_share_what_memory_there_is_for_them() {
    let mut guest = Guest::new(128);
    let service = UnixListener::bind(guest.service_path(PORT)).unwrap();
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut windows = Vec::new();
    for port in 0..100 {
        guest.control(Op::Request, port, PORT);
        windows.push(guest.expect(Op::Response).buf_alloc);
        streams.push(service.accept().unwrap().0);
    }
    assert_eq!(windows[..WIDE_CONNECTIONS], [WIDE_WINDOW; WIDE_CONNECTIONS]);
    assert!(windows[WIDE_CONNECTIONS..].iter().all(|window| *window == NARROW_WINDOW));
    // One that ends gives its window to the next.
    guest.control(Op::Reset, 3, PORT);
    guest.control(Op::Request, 3, PORT);
    assert_eq!(guest.expect(Op::Response).buf_alloc, WIDE_WINDOW);
    drop(streams);
    drop(service);
    guest.settle();
    let ended: Vec<Header> = guest.received.drain(..).map(|(header, _)| header).collect();
    for header in ended {
        guest.control(Op::Reset, header.dst_port, header.src_port);
    }
    guest.settle();
    guest.assert_clean();
}
