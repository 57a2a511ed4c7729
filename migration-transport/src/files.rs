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
