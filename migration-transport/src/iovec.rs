//! System calls on guest memory: an unsafe module.
//!
//! Guest memory is never a `&[u8]`, because the guest changes it at any time. The kernel does not mind: it gets the
//! addresses as iovecs, and no Rust reference to the memory ever exists.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use migration_core::RamSlice;

use crate::gather::Gather;

/// The most iovecs that Linux takes in one call (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

/// One `sendmsg` of what comes next in `gather`, as far as the kernel takes it. Never raises SIGPIPE.
pub(crate) fn send(fd: BorrowedFd<'_>, gather: &Gather<'_>) -> io::Result<usize> {
    let head = gather.head();
    // the kernel only reads through `iov_base` when it sends; the field is `*mut` because receiving shares the type
    let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
    let head = (head.iov_len > 0).then_some(head);
    let mut iovecs: Vec<_> = head.into_iter().chain(gather.slices().map(iovec)).take(IOV_MAX).collect();
    let message = message(&mut iovecs);
    // SAFETY: `message` holds pointers to `iovecs` alone, which outlives the call, with its length. The first iovec may
    // name `head`, borrowed for as long as `gather`; the others name guest memory that is mapped for the lifetime of
    // its `RamSlice`s, by their contract. The kernel only reads from all of them.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// One `recvmsg` into the guest memory that comes next in `gather` (whose head is not touched). Waits until all of it
/// is filled, the stream ends or the receive time-out passes; 0 means the end of the stream, if there is room at all.
pub(crate) fn receive(fd: BorrowedFd<'_>, gather: &Gather<'_>) -> io::Result<usize> {
    let mut iovecs: Vec<_> = gather.slices().map(iovec).take(IOV_MAX).collect();
    let mut message = message(&mut iovecs);
    // SAFETY: `message` holds pointers to `iovecs` alone, which outlives the call, with its length. The iovecs name
    // guest memory, which is mapped writable for the lifetime of its `RamSlice`s and never borrowed as a reference.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_WAITALL) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

fn iovec(slice: RamSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }
}

/// A message without address and control data. It points into `iovecs` and must not outlive them.
fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` consists of integers and pointers, for which all zeros are valid values.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}
