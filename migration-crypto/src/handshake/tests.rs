//! Tests of how a source reads an answer, and of the kinds and codes of errors.

use migration_core::RamSlice;

use super::*;

/// Returns the bytes of `rest`, then fails with an error of kind `end`.
struct Script<'a> {
    rest: &'a [u8],
    end: io::ErrorKind,
}

impl ReadHalf for Script<'_> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let (now, later) = self.rest.split_at_checked(buf.len()).ok_or(self.end)?;
        buf.copy_from_slice(now);
        self.rest = later;
        Ok(())
    }

    fn read_ram(&mut self, _: &[RamSlice<'_>]) -> io::Result<()> {
        unreachable!("a handshake reads no guest memory")
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

struct Discard;

impl WriteHalf for Discard {
    fn write_all(&mut self, _: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// Reads an answer from `bytes`. Returns the result and the number of bytes that were not read.
fn answer(bytes: &[u8], end: io::ErrorKind) -> (Result<Vec<u8>, HandshakeError>, usize) {
    let mut reader = Script { rest: bytes, end };
    let deadline = Instant::now() + Duration::from_secs(600);
    let answer = Wire { reader: &mut reader, writer: &mut Discard, deadline }.read_answer();
    (answer, reader.rest.len())
}

#[test]
fn answers_are_bounded_and_a_closed_link_is_no_other_failure() {
    use io::ErrorKind::{ConnectionReset, PermissionDenied, UnexpectedEof};
    let framed = |len: usize, reserved: [u8; 2]| {
        let len_field = (len as u16).to_le_bytes();
        [&ANSWER[..], &len_field, &reserved, &vec![7; len]].concat()
    };
    for len in [0, 1, MAX_MESSAGE] {
        assert_eq!(answer(&framed(len, [0; 2]), UnexpectedEof).0.unwrap(), vec![7; len]);
    }
    for bad in [framed(MAX_MESSAGE + 1, [0; 2]), framed(5, [0, 1]), framed(5, [1, 0])] {
        let (refused, unread) = answer(&bad, UnexpectedEof);
        assert!(matches!(refused, Err(HandshakeError::Malformed("answer"))), "{refused:?}");
        assert_eq!(unread, bad.len() - 8);
    }
    for cut in [&b""[..], b"SEA", b"SEAL\x05\0\0\0four"] {
        for end in [UnexpectedEof, ConnectionReset] {
            assert!(matches!(answer(cut, end).0, Err(HandshakeError::Closed)), "{cut:?} {end}");
        }
        let failed = answer(cut, PermissionDenied).0;
        assert!(matches!(&failed, Err(HandshakeError::Link(e)) if e.kind() == PermissionDenied), "{failed:?}");
    }
}

#[test]
fn one_line_of_an_unidentified_peer_is_read_and_no_more() {
    let ssh = b"SSH-2.0-OpenSSH_9.9\r\nand more";
    let (error, unread) = answer(ssh, io::ErrorKind::UnexpectedEof);
    let error = error.unwrap_err();
    assert!(matches!(error, HandshakeError::NotADestination(_)));
    assert!(error.to_string().contains("\"SSH-2.0-OpenSSH_9.9\""), "{error}");
    assert_eq!(unread, b"and more".len());
    let (error, unread) = answer(&[b'x'; FOREIGN_BYTES + 9], io::ErrorKind::UnexpectedEof);
    assert!(matches!(error, Err(HandshakeError::NotADestination(_))));
    assert_eq!(unread, 9);
}

#[test]
fn errors_have_kinds_and_codes() {
    use io::ErrorKind;
    let refused = || HandshakeError::Refused { code: ErrorCode::Security, text: "no".into() };
    for (error, kind, code) in [
        (HandshakeError::Link(ErrorKind::BrokenPipe.into()), ErrorKind::BrokenPipe, None),
        (HandshakeError::TimedOut, ErrorKind::TimedOut, None),
        (HandshakeError::Unidentified, ErrorKind::PermissionDenied, None),
        (HandshakeError::NotADestination("x".into()), ErrorKind::PermissionDenied, None),
        (HandshakeError::Closed, ErrorKind::UnexpectedEof, None),
        (refused(), ErrorKind::ConnectionRefused, None),
        (HandshakeError::Version(9), ErrorKind::PermissionDenied, Some(ErrorCode::Version)),
        (HandshakeError::UnknownSession, ErrorKind::PermissionDenied, Some(ErrorCode::UnknownSession)),
        (HandshakeError::Malformed("x"), ErrorKind::PermissionDenied, Some(ErrorCode::Protocol)),
        (HandshakeError::WrongKey("key"), ErrorKind::PermissionDenied, Some(ErrorCode::Security)),
        (HandshakeError::PlainPeer, ErrorKind::PermissionDenied, Some(ErrorCode::Security)),
    ] {
        assert_eq!(error.code(), code, "{error}");
        let text = error.to_string();
        assert_eq!(io::Error::from(error).kind(), kind, "{text}");
    }
}
