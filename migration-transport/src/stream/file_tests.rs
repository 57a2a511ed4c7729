//! Tests of open files that are sent between the bytes of a stream.

use std::{
    fs::File,
    io::{ErrorKind, IoSlice, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixStream},
    },
    time::Duration,
};

use migration_core::channel::{Channel, Halves};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
};

use crate::{Bandwidth, Limiter, StreamChannel};

fn pair() -> (UnixStream, Halves) {
    let (near, far) = UnixStream::pair().unwrap();
    (near, halves(far))
}

fn halves(socket: impl Into<OwnedFd>) -> Halves {
    let mut channel = StreamChannel::new(socket, "test").unwrap();
    channel.set_idle_timeout(Some(Duration::from_secs(20))).unwrap();
    Box::new(channel).split().unwrap()
}

/// Returns how many descriptors of this process refer to this file.
fn open_here(file: &File) -> usize {
    let wanted = (file.metadata().unwrap().dev(), file.metadata().unwrap().ino());
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter(|e| std::fs::metadata(e.path()).is_ok_and(|m| (m.dev(), m.ino()) == wanted)).count()
}

#[test]
fn files_travel_in_order_between_other_bytes_and_close_on_exec() {
    let (near, mut far) = pair();
    let limiter = Limiter::new(Bandwidth::from_bits_per_second(1_000_000));
    let channel = StreamChannel::new(near, "test").unwrap();
    let mut near = limiter.wrap(Box::new(channel)).split().unwrap();
    let files: Vec<File> = (0..300).map(|_| tempfile::tempfile().unwrap()).collect();
    near.writer.write_all(b"before", &[]).unwrap();
    near.writer.send_files(&files.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
    near.writer.write_all(b"behind", &[]).unwrap();
    let mut word = [0; 6];
    far.reader.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"before");
    let came = far.reader.receive_files(300).unwrap();
    far.reader.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"behind");
    for (file, came) in files.iter().zip(came) {
        let flags = FdFlag::from_bits_retain(fcntl(&came, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
        assert_eq!(file.metadata().unwrap().ino(), File::from(came).metadata().unwrap().ino());
    }
}

#[test]
fn too_many_too_few_and_none_are_refused_and_nothing_stays_open() {
    let file = tempfile::tempfile().unwrap();
    for (sent, said, due) in [(3, 3, 2), (3, 2, 2), (1, 1, 2), (1, 2, 2), (253, 1, 1), (2, 255, 2)] {
        let (near, mut far) = pair();
        let raw = vec![file.as_raw_fd(); sent];
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(near.as_raw_fd(), &[IoSlice::new(&[said])], &rights, MsgFlags::empty(), None).unwrap();
        let error = far.reader.receive_files(due).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{sent} {said} {due}: {error}");
        drop((near, far));
        assert_eq!(open_here(&file), 1, "{sent} {said} {due}");
    }
    // bytes without files, and then the end of the stream
    let (mut near, mut far) = pair();
    near.write_all(&[2]).unwrap();
    assert_eq!(far.reader.receive_files(2).unwrap_err().kind(), ErrorKind::InvalidData);
    drop(near);
    assert_eq!(far.reader.receive_files(2).unwrap_err().kind(), ErrorKind::UnexpectedEof);
}

#[test]
fn files_that_come_unasked_are_not_opened() {
    let file = tempfile::tempfile().unwrap();
    let (near, mut far) = pair();
    let raw = [file.as_raw_fd(); 9];
    let rights = [ControlMessage::ScmRights(&raw)];
    sendmsg::<()>(near.as_raw_fd(), &[IoSlice::new(b"word")], &rights, MsgFlags::empty(), None).unwrap();
    let mut word = [0; 4];
    far.reader.read_exact(&mut word).unwrap();
    assert_eq!((&word, open_here(&file)), (b"word", 1));
}

#[test]
fn they_do_not_travel_over_tcp_or_in_memory() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (memory, _far) = crate::memory::pair(100);
    for mut ends in [halves(near), Box::new(memory).split().unwrap()] {
        assert_eq!(ends.writer.send_files(&[listener.as_fd()]).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(ends.reader.receive_files(1).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
