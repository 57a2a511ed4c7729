//! System calls on guest memory. This module has unsafe code.
//!
//! Guest memory is never a `&[u8]`, because the guest changes it at any time. The kernel gets its
//! addresses as iovecs, and no Rust reference to the memory ever exists.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use migration_core::RamSlice;

use crate::gather::Gather;

/// The largest number of iovecs in one call on Linux (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

/// Calls `sendmsg` once with the next data of `gather`. Returns how many bytes the kernel accepted.
/// Never raises SIGPIPE.
pub(crate) fn send(fd: BorrowedFd<'_>, gather: &Gather<'_>) -> io::Result<usize> {
    let head = gather.head();
    // the kernel only reads through `iov_base` here; the field is `*mut` because the type is also
    // used for receiving
    let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
    let head = (head.iov_len > 0).then_some(head);
    let mut iovecs: Vec<_> = head.into_iter().chain(gather.slices().map(iovec)).take(IOV_MAX).collect();
    let message = message(&mut iovecs);
    // SAFETY: `message` points only to `iovecs`, which outlives the call, and has its length. The
    // first iovec may point to `head`, which is borrowed for as long as `gather`. The others point
    // to guest memory, which is mapped for the lifetime of its `RamSlice`s by their contract. The
    // kernel only reads.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Calls `recvmsg` once to fill the next guest memory of `gather`, without its head. Waits until
/// all of it is filled, the stream ends or the receive time-out passes. Returns the number of
/// bytes. 0 means the end of the stream, unless there is no memory to fill.
pub(crate) fn receive(fd: BorrowedFd<'_>, gather: &Gather<'_>) -> io::Result<usize> {
    let mut iovecs: Vec<_> = gather.slices().map(iovec).take(IOV_MAX).collect();
    let mut message = message(&mut iovecs);
    // SAFETY: `message` points only to `iovecs`, which outlives the call, and has its length. The
    // iovecs point to guest memory, which is mapped writable for the lifetime of its `RamSlice`s,
    // and to which no Rust reference exists.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_WAITALL) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

fn iovec(slice: RamSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }
}

/// Makes a message without address and control data. It points to `iovecs` and must not outlive
/// them.
fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` consists of integers and pointers, for which zeros are valid values.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}
