//! Requests of userfaultfd that the crate of that name lacks (which features the kernel has, CONTINUE, MOVE), or whose
//! results it hides: a request over several pages can end in the middle, and one has to know where.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use nix::errno::Errno;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

const API_VERSION: u64 = 0xaa;
// `_IOWR(0xaa, 0x3f, struct uffdio_api)` and `_IO(0xaa, 0x00)`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// The feature bits that the kernel offers. The descriptor this takes is closed again, since each can be asked once.
pub(super) fn offered() -> io::Result<u64> {
    let fd = create()?;
    let mut api = Api { api: API_VERSION, features: 0, ioctls: 0 };
    // SAFETY: `api` is a valid `uffdio_api` that the kernel reads and writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, ptr::from_mut(&mut api)) } {
        0 => Ok(api.features),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor that also handles faults in the kernel: KVM's are such.
fn create() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: the ioctl takes flags and returns a new descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
        // SAFETY: as above.
        Err(e) if e.kind() == io::ErrorKind::NotFound => unsafe {
            libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int
        },
        Err(error) => return Err(error),
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How far a request came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// Bytes done, from the start of its range. Threads that sleep for these are woken.
    pub(crate) done: u64,
    /// Why it ended there; `None` when it did all.
    pub(crate) error: Option<Errno>,
}

/// `struct uffdio_copy` and `struct uffdio_move`, which are alike.
#[repr(C)]
struct Transfer {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// Bytes done, or an error number below zero.
    done: i64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_zeropage` and `struct uffdio_continue`, which are alike.
#[repr(C)]
struct Map {
    range: Range,
    mode: u64,
    /// Bytes done, or an error number below zero.
    done: i64,
}

// `_IOWR(0xaa, nr, …)` of the structures above, and `_IOR(0xaa, 2, struct uffdio_range)`
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_MOVE: libc::c_ulong = 0xc028_aa05;
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;

/// Copies the `len` bytes at `src` into missing pages at `dst`.
///
/// # Safety
/// The bytes at `src` must be mapped, and the memory at `dst` must not be borrowed.
pub(crate) unsafe fn copy(fd: BorrowedFd<'_>, dst: u64, src: u64, len: u64) -> Progress {
    let mut arg = Transfer { dst, src, len, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_copy`; the caller answers for the memory that it names.
    let error = unsafe { request(fd, UFFDIO_COPY, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Moves the pages at `src` to missing pages at `dst`, without copying; what is moved is missing at `src` then.
///
/// # Safety
/// Neither the memory at `src` nor that at `dst` may be borrowed.
pub(crate) unsafe fn move_pages(fd: BorrowedFd<'_>, dst: u64, src: u64, len: u64) -> Progress {
    let mut arg = Transfer { dst, src, len, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_move`; the caller answers for the memory that it names.
    let error = unsafe { request(fd, UFFDIO_MOVE, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Makes the `len` bytes of missing pages at `start` zeros.
///
/// # Safety
/// The memory must not be borrowed.
pub(crate) unsafe fn zero(fd: BorrowedFd<'_>, start: u64, len: u64) -> Progress {
    let mut arg = Map { range: Range { start, len }, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_zeropage`; the caller answers for the memory that it names.
    let error = unsafe { request(fd, UFFDIO_ZEROPAGE, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Maps the pages that the file behind `start` has.
///
/// # Safety
/// The memory must not be borrowed.
pub(crate) unsafe fn map(fd: BorrowedFd<'_>, start: u64, len: u64) -> Progress {
    let mut arg = Map { range: Range { start, len }, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_continue`; the caller answers for the memory that it names.
    let error = unsafe { request(fd, UFFDIO_CONTINUE, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Wakes the threads that sleep for a page among the `len` bytes at `start`; they try again.
pub(crate) fn wake(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut arg = Range { start, len };
    // SAFETY: `arg` is a valid `uffdio_range`; waking changes no memory, whatever the address.
    match unsafe { request(fd, UFFDIO_WAKE, ptr::from_mut(&mut arg)) } {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}

impl Progress {
    /// `done` as the kernel left it: where it did nothing it repeats the error there, or leaves what was there before.
    fn new(done: i64, len: u64, error: Option<Errno>) -> Self {
        let done = u64::try_from(done).unwrap_or(0).min(len);
        Self { done: if error.is_none() { len } else { done }, error }
    }
}

/// # Safety
/// `arg` must be a valid object of the structure that `number` takes, and what it asks for must be sound.
unsafe fn request<T>(fd: BorrowedFd<'_>, number: libc::c_ulong, arg: *mut T) -> Option<Errno> {
    // SAFETY: promised by the caller; the kernel reads and writes only `*arg` and what it names.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, arg) };
    (result != 0).then(Errno::last)
}
