//! Open files over a Unix socket (`SCM_RIGHTS`): an unsafe module, for what comes in control data.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Bytes of a descriptor in control data.
const FILE: usize = size_of::<RawFd>();

/// Sends `files`, at most 253 and at least one, with a byte that says how many. Never raises SIGPIPE.
pub(crate) fn send(socket: BorrowedFd<'_>, files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let count = u8::try_from(files.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let (byte, rights) = ([count], [ControlMessage::ScmRights(&raw)]);
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&byte)], &rights, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// The next byte of the stream and the files that came with it, `most` of them at most; `None` at the end of the stream.
///
/// # Errors
/// `InvalidData` when there were more than `most`, or more than this process may open. Those that came are closed again.
pub(crate) fn receive(socket: BorrowedFd<'_>, most: usize) -> io::Result<Option<(u8, Vec<OwnedFd>)>> {
    let bytes = u32::try_from(most * FILE).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: they only compute.
    let (len, space) = unsafe { (libc::CMSG_LEN(bytes) as usize, libc::CMSG_SPACE(bytes) as usize) };
    // words, so that it is aligned as a `cmsghdr` is
    let mut control = vec![0u64; space.div_ceil(size_of::<u64>())];
    let mut byte = [0u8];
    let mut iovec = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    // SAFETY: `msghdr` consists of integers and pointers, for which all zeros are valid values.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iovec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // without the padding behind it, in which another descriptor would find room
    message.msg_controllen = len;
    // SAFETY: `message` points to `iovec`, through it to `byte`, and to `control`, which all outlive the call, with lengths
    // that are not beyond theirs.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut files = Vec::new();
    // SAFETY: the kernel has filled `control` in and set the length of what is there.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return only headers that lie inside `control`, aligned.
        let libc::cmsghdr { cmsg_len, cmsg_level, cmsg_type } = unsafe { ptr::read(header) };
        if (cmsg_level, cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: as above; the data begins behind the header.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            // SAFETY: only computes.
            let count = cmsg_len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize) / FILE;
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there, inside `control`, and opened each for this process:
                // nobody else owns it.
                files.push(unsafe { OwnedFd::from_raw_fd(ptr::read_unaligned(data.add(index))) });
            }
        }
        // SAFETY: `header` came from the same message.
        header = unsafe { libc::CMSG_NXTHDR(&message, header) };
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        let why = format!("more than {most} open files came at once, or more than this process may open");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok((received > 0).then_some((byte[0], files)))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{ErrorKind, Write},
        os::{
            fd::AsFd,
            unix::{fs::MetadataExt, net::UnixStream},
        },
        time::Duration,
    };

    use migration_core::channel::{Channel, Halves};
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;
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

    /// How many descriptors of this process name this file.
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
        // bytes without files; and then the end
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
}
