//! Requests of userfaultfd that the crate `userfaultfd` lacks or whose results it hides. It lacks
//! the query for the kernel's features, CONTINUE and MOVE. It hides how far a request over several
//! pages came before it failed.

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

/// Returns the feature bits that the kernel offers. Opens a descriptor for this and closes it
/// again, because the features of a descriptor can be queried only once.
pub(super) fn offered() -> io::Result<u64> {
    let fd = create()?;
    let mut api = Api { api: API_VERSION, features: 0, ioctls: 0 };
    // SAFETY: `api` is a valid `uffdio_api` that the kernel reads and writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, ptr::from_mut(&mut api)) } {
        0 => Ok(api.features),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Creates a userfaultfd that also handles faults in the kernel, such as those of KVM.
fn create() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: the ioctl takes flags and returns a new descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
        // SAFETY: the system call takes flags and returns a new descriptor.
        Err(e) if e.kind() == io::ErrorKind::NotFound => unsafe {
            libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int
        },
        Err(error) => return Err(error),
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The progress of a request over several pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// The bytes from the start of the range that were completed. Threads that waited for them are
    /// woken.
    pub(crate) done: u64,
    /// The reason why the request ended early, or `None` if it completed.
    pub(crate) error: Option<Errno>,
}

/// `struct uffdio_copy` and `struct uffdio_move`, which have the same layout.
#[repr(C)]
struct Transfer {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// The number of completed bytes, or a negative error number.
    done: i64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_zeropage` and `struct uffdio_continue`, which have the same layout.
#[repr(C)]
struct Map {
    range: Range,
    mode: u64,
    /// The number of completed bytes, or a negative error number.
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
/// The bytes at `src` must be mapped, and no Rust reference to the memory at `dst` may exist.
pub(crate) unsafe fn copy(fd: BorrowedFd<'_>, dst: u64, src: u64, len: u64) -> Progress {
    let mut arg = Transfer { dst, src, len, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_copy`, and the caller guarantees the memory in it.
    let error = unsafe { request(fd, UFFDIO_COPY, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Moves the pages at `src` to missing pages at `dst` without copying them. The pages at `src` are
/// missing afterwards.
///
/// # Safety
/// No Rust reference to the memory at `src` or at `dst` may exist.
pub(crate) unsafe fn move_pages(fd: BorrowedFd<'_>, dst: u64, src: u64, len: u64) -> Progress {
    let mut arg = Transfer { dst, src, len, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_move`, and the caller guarantees the memory in it.
    let error = unsafe { request(fd, UFFDIO_MOVE, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Fills the missing pages in the `len` bytes at `start` with zeros.
///
/// # Safety
/// No Rust reference to the memory may exist.
pub(crate) unsafe fn zero(fd: BorrowedFd<'_>, start: u64, len: u64) -> Progress {
    let mut arg = Map { range: Range { start, len }, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_zeropage`, and the caller guarantees the memory in it.
    let error = unsafe { request(fd, UFFDIO_ZEROPAGE, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Maps the pages that the mapped file has for the `len` bytes at `start`.
///
/// # Safety
/// No Rust reference to the memory may exist.
pub(crate) unsafe fn map(fd: BorrowedFd<'_>, start: u64, len: u64) -> Progress {
    let mut arg = Map { range: Range { start, len }, mode: 0, done: 0 };
    // SAFETY: `arg` is a valid `uffdio_continue`, and the caller guarantees the memory in it.
    let error = unsafe { request(fd, UFFDIO_CONTINUE, ptr::from_mut(&mut arg)) };
    Progress::new(arg.done, len, error)
}

/// Wakes the threads that wait for a page in the `len` bytes at `start`. They repeat their access.
pub(crate) fn wake(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut arg = Range { start, len };
    // SAFETY: `arg` is a valid `uffdio_range`. Waking changes no memory, whatever the address is.
    match unsafe { request(fd, UFFDIO_WAKE, ptr::from_mut(&mut arg)) } {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}

impl Progress {
    /// Makes a result from `done` as the kernel left it. If nothing was completed, the kernel
    /// writes the error there or leaves the old value.
    fn new(done: i64, len: u64, error: Option<Errno>) -> Self {
        let done = u64::try_from(done).unwrap_or(0).min(len);
        Self { done: if error.is_none() { len } else { done }, error }
    }
}

/// Makes a request. Returns its error, if any.
///
/// # Safety
/// `arg` must be a valid object of the structure that `number` takes, and the request must be
/// sound.
unsafe fn request<T>(fd: BorrowedFd<'_>, number: libc::c_ulong, arg: *mut T) -> Option<Errno> {
    // SAFETY: the caller guarantees the request. The kernel accesses only `*arg` and the memory in
    // it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, arg) };
    (result != 0).then(Errno::last)
}
