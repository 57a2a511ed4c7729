//! Passes open files through a Unix socket (`SCM_RIGHTS`), such as the memory files of a guest's
//! RAM.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use migration_core::channel::FILES_PER_BYTE;
use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};

/// The largest number of files that can be sent with one message: the kernel's limit
/// (`SCM_MAX_FD`).
pub const MAX_FILES: usize = FILES_PER_BYTE;

/// Writes all of `bytes` and sends `files` with the first of them. The files stay open in this
/// process.
///
/// # Errors
/// Fails with [`InvalidInput`](io::ErrorKind::InvalidInput) if there are files but no bytes, or
/// more than [`MAX_FILES`] files, and with [`WouldBlock`](io::ErrorKind::WouldBlock) if the
/// socket's time-out passes. Other errors are those of the operating system. After an error it is
/// unknown how much was sent, and the connection cannot be used any more.
pub fn send_files(socket: BorrowedFd<'_>, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let invalid = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if files.len() > MAX_FILES {
        return invalid(format!("{} files, but one message can carry at most {MAX_FILES}", files.len()));
    }
    if bytes.is_empty() && !files.is_empty() {
        return invalid("files need at least one byte of data".into());
    }
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let (mut files, mut at) = (files, 0);
    while at < bytes.len() {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return invalid("the files do not fit into a message".into());
        }
        match sendmsg(socket, &[IoSlice::new(&bytes[at..])], &mut control, SendFlags::NOSIGNAL) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => (at, files) = (at + sent, &[]),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads at least one byte into `buf`, and receives up to `max` files that were sent with these
/// bytes. The files are closed on `exec`. Returns the number of bytes, which is 0 at the end of the
/// stream.
///
/// One call never reads across the bytes of two sends with files. The next call returns the second.
///
/// # Errors
/// Fails with [`InvalidData`](io::ErrorKind::InvalidData) if more than `max` files were sent or if
/// this process may not open that many; all received files are closed then. Fails with
/// [`WouldBlock`](io::ErrorKind::WouldBlock) if the socket's time-out passes. Other errors are
/// those of the operating system.
pub fn receive_files(socket: BorrowedFd<'_>, buf: &mut [u8], max: usize) -> io::Result<(usize, Vec<OwnedFd>)> {
    let max = max.min(MAX_FILES);
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buf)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    if files.len() > max {
        let why = format!("{} files were received with a message that may carry {max}", files.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        let why = "files of a message were lost: this process may not open so many";
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok((received.bytes, files))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::{
            fd::{AsFd, AsRawFd},
            unix::net::UnixStream,
        },
    };

    use super::*;

    fn file(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn text(file: OwnedFd) -> String {
        let (mut file, mut text) = (File::from(file), String::new());
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn files_come_with_their_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let (one, two) = (file("one"), file("two"));
        send_files(a.as_fd(), b"first", &[one.as_fd(), two.as_fd()]).unwrap();
        send_files(a.as_fd(), b"second", &[]).unwrap();
        send_files(a.as_fd(), b"third", &[two.as_fd()]).unwrap();
        drop(a);
        let mut buf = [0; 64];
        let (bytes, files) = receive_files(b.as_fd(), &mut buf[..5], 2).unwrap();
        assert_eq!(&buf[..bytes], b"first");
        let flags = |fd: &OwnedFd| std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        assert!(files.iter().all(|fd| flags(fd).contains("flags:\t02")), "closed on exec");
        assert_eq!(files.into_iter().map(text).collect::<Vec<_>>(), ["one", "two"]);
        let (bytes, files) = receive_files(b.as_fd(), &mut buf, 2).unwrap();
        let mut came = buf[..bytes].to_vec();
        let files = if files.is_empty() {
            let (bytes, files) = receive_files(b.as_fd(), &mut buf, 2).unwrap();
            came.extend_from_slice(&buf[..bytes]);
            files
        } else {
            files
        };
        assert_eq!((came.as_slice(), files.len()), (&b"secondthird"[..], 1));
        let (bytes, files) = receive_files(b.as_fd(), &mut buf, 2).unwrap();
        assert_eq!((bytes, files.len()), (0, 0), "the end");
    }

    #[test]
    fn long_messages_go_whole() {
        let (a, b) = UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 3) as u8).collect();
        let copy = bytes.clone();
        let sender = std::thread::spawn(move || send_files(a.as_fd(), &copy, &[file("one").as_fd()]));
        let (mut came, mut buf, mut files) = (Vec::new(), vec![0; 70_000], Vec::new());
        while came.len() < bytes.len() {
            let (n, with) = receive_files(b.as_fd(), &mut buf, 1).unwrap();
            came.extend_from_slice(&buf[..n]);
            files.extend(with);
        }
        sender.join().unwrap().unwrap();
        assert!(came == bytes && files.len() == 1);
    }

    #[test]
    fn more_files_than_wanted_are_refused_and_closed() {
        let many = [7, 1, MAX_FILES];
        for count in many {
            let (a, b) = UnixStream::pair().unwrap();
            let (mut pipe, end) = io::pipe().unwrap();
            let end = OwnedFd::from(end);
            send_files(a.as_fd(), b"x", &vec![end.as_fd(); count]).unwrap();
            drop(end);
            let error = receive_files(b.as_fd(), &mut [0; 8], count - 1).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
            // every copy of the writing end is closed
            assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
        }
        let (a, _b) = UnixStream::pair().unwrap();
        let error = send_files(a.as_fd(), b"x", &[a.as_fd(); MAX_FILES + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        assert_eq!(send_files(a.as_fd(), b"", &[a.as_fd()]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
