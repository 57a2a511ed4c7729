//! Measures how fast guest memory is transferred through a channel on this host, with various
//! settings.
//!
//! Usage: `throughput [MIB] [ROUNDS] [FILTER]`. Source and destination are threads of this process.
//! The destination's memory is new in each round, with transparent huge pages. The best of ROUNDS
//! is shown, in MB/s.

use std::{
    env,
    error::Error,
    io,
    num::NonZeroUsize,
    os::fd::AsFd,
    os::unix::net::UnixStream,
    ptr::NonNull,
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    RamSlice,
    channel::{Channel, Connector, Listener},
};
use migration_transport::{Congestion, ConnectOptions, SocketOptions, StreamChannel, TcpConnector, TcpListener};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Anonymous memory with huge pages.
struct Memory {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: all access is through `RamSlice`, whose accesses may race, and the mapping itself never
// changes.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address of the new mapping, so no existing mapping
        // changes.
        let address = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)? };
        // SAFETY: the complete mapping made above.
        unsafe { madvise(address, len, MmapAdvise::MADV_HUGEPAGE)? };
        Ok(Self { address: address.cast(), len })
    }

    fn slice(&self, at: usize, len: usize) -> RamSlice<'_> {
        assert!(at + len <= self.len);
        // SAFETY: inside the mapping, which lives as long as `self`, and to which no Rust reference
        // exists.
        unsafe { RamSlice::new(self.address.add(at), len) }
    }

    fn touch(&self) {
        (0..self.len).step_by(4096).for_each(|at| self.slice(at, 8).copy_from(&at.to_ne_bytes()));
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, which nothing uses any more.
        let _ = unsafe { munmap(self.address.cast(), self.len) };
    }
}

fn tcp(options: &SocketOptions) -> io::Result<(Box<dyn Channel>, Box<dyn Channel>)> {
    let mut listener = TcpListener::bind("127.0.0.1", 0, options.clone())?;
    let options = ConnectOptions { socket: options.clone(), ..ConnectOptions::default() };
    let near = TcpConnector::new("127.0.0.1", listener.port(), options).connect()?;
    let far = listener.accept(Duration::from_secs(5))?.ok_or(io::ErrorKind::TimedOut)?;
    Ok((near, far))
}

fn unix(options: &SocketOptions) -> io::Result<(Box<dyn Channel>, Box<dyn Channel>)> {
    let (near, far) = UnixStream::pair()?;
    if let Some(bytes) = options.send_buffer {
        socket2::SockRef::from(&near.as_fd()).set_send_buffer_size(bytes)?;
    }
    Ok((Box::new(StreamChannel::new(near, "far")?), Box::new(StreamChannel::new(far, "near")?)))
}

/// Transfers all of `from` once over `lanes` channels, in writes of `chunk` bytes.
fn run(
    from: &Memory,
    lanes: usize,
    chunk: usize,
    mut open: impl FnMut() -> io::Result<(Box<dyn Channel>, Box<dyn Channel>)>,
) -> Result<f64, Box<dyn Error>> {
    drop({
        // memory that the host has reclaimed is slow to allocate, so populate memory for the
        // destination first
        let warm = Memory::new(from.len)?;
        warm.touch();
        from.touch();
        warm
    });
    let to = Memory::new(from.len)?;
    let mut ends = Vec::new();
    for _ in 0..lanes {
        let (near, far) = open()?;
        ends.push((near.split()?, far.split()?));
    }
    let share = from.len / lanes / chunk * chunk;
    let start = Instant::now();
    thread::scope(|scope| {
        for (lane, (mut near, mut far)) in ends.into_iter().enumerate() {
            let (from, to) = (&from, &to);
            let chunks = (lane * share..(lane + 1) * share).step_by(chunk);
            let to_read = chunks.clone();
            scope.spawn(move || {
                chunks.into_iter().for_each(|at| near.writer.write_all(&[0; 32], &[from.slice(at, chunk)]).unwrap());
            });
            scope.spawn(move || {
                for at in to_read {
                    far.reader.read_exact(&mut [0; 32]).unwrap();
                    far.reader.read_ram(&[to.slice(at, chunk)]).unwrap();
                }
            });
        }
    });
    Ok((share * lanes) as f64 / start.elapsed().as_secs_f64() / 1e6)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let mib: usize = args.next().map_or(Ok(700), |arg| arg.parse())?;
    let rounds: usize = args.next().map_or(Ok(3), |arg| arg.parse())?;
    let filter = args.next().unwrap_or_default();
    let from = Memory::new(mib << 20)?;

    let options = |congestion: &str, buffer| SocketOptions {
        congestion: Congestion::Named(congestion.into()),
        send_buffer: buffer,
        receive_buffer: buffer,
        ..SocketOptions::default()
    };
    let mut settings = Vec::new();
    for congestion in ["bbr", "cubic", "reno"] {
        settings.push((format!("tcp {congestion} autotuned"), false, options(congestion, None)));
    }
    for buffer in [512 << 10, 1 << 20, 4 << 20] {
        settings.push((format!("tcp cubic {} KiB", buffer >> 10), false, options("cubic", Some(buffer))));
    }
    for buffer in [None, Some(1 << 20), Some(4 << 20)] {
        let size = buffer.map_or("default".into(), |bytes| format!("{} KiB", bytes >> 10));
        settings.push((format!("unix {size}"), true, options("", buffer)));
    }
    println!("{:24} {:>5} {:>8} {:>8} {:>8} {:>8}", "", "lanes", "64K", "256K", "1M", "2M");
    for (name, is_unix, options) in settings.iter().filter(|setting| setting.0.contains(&filter)) {
        for lanes in [1, 2, 4] {
            print!("{name:24} {lanes:5}");
            for chunk in [64 << 10, 256 << 10, 1 << 20, 2 << 20] {
                let mut best = 0f64;
                for _ in 0..rounds {
                    best = best.max(run(&from, lanes, chunk, || if *is_unix { unix(options) } else { tcp(options) })?);
                }
                print!(" {best:8.0}");
            }
            println!();
        }
    }
    Ok(())
}
