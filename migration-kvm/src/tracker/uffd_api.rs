//! The one request of userfaultfd that the crate of that name does not offer: which features the kernel has.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

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
