//! Throughput on this host, on one core: the ciphers by themselves, and a lane's records over a link that does nothing.
//!
//! `cargo run --release -p migration-crypto --example throughput`

use std::{
    error::Error,
    hint::black_box,
    io,
    time::{Duration, Instant},
};

use migration_core::{GuestRam, HeapRam, RamLayout, RamRegion, RamSlice, channel::WriteHalf};
use migration_crypto::{
    KeyLimits, Suite,
    aead::{self, Backend, RustCrypto},
    record::fixed_key,
};

const TIME: Duration = Duration::from_millis(400);

/// GB/s of `work`, which is told how many bytes it is about.
fn measure(bytes: usize, mut work: impl FnMut()) -> f64 {
    work();
    let (begin, mut done) = (Instant::now(), 0u64);
    while begin.elapsed() < TIME {
        work();
        done += bytes as u64;
    }
    done as f64 / begin.elapsed().as_secs_f64() / 1e9
}

/// Takes everything.
struct Sink;

impl WriteHalf for Sink {
    fn write_all(&mut self, head: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
        black_box(head);
        Ok(())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    const FRAME: u64 = 1 << 20;
    const RAM: u64 = 64 << 20;
    let ram = HeapRam::new(RamLayout::new(vec![RamRegion { gpa: 0, len: RAM }])?)?;
    let ram: &dyn GuestRam = &ram;
    ram.write(0, &vec![0x5a; RAM as usize])?;
    let mut backends: Vec<&'static dyn Backend> = vec![&RustCrypto];
    if aead::best().name() != RustCrypto.name() {
        backends.push(aead::best());
    }
    println!("GB/s on one core; records: copied from guest memory, sealed");
    println!("{:<12} {:<18} {:>9} {:>9} | records of 64 KiB, 256 KiB, 1 MiB", "", "", "seal 64K", "copy+open");
    for backend in backends {
        for suite in Suite::ALL {
            let key = backend.key(suite, &vec![1; suite.key_len()])?;
            let mut data = vec![0; (64 << 10) + aead::TAG_LEN];
            let seal = measure(64 << 10, || _ = black_box(key.seal(&[0; 12], b"", &mut data[..64 << 10])));
            let tag = key.seal(&[0; 12], b"", &mut data[..64 << 10])?;
            data[64 << 10..].copy_from_slice(&tag);
            let mut work = data.clone();
            let open = measure(64 << 10, || {
                work.copy_from_slice(&data);
                _ = black_box(key.open(&[0; 12], b"", &mut work));
            });
            print!("{:<12} {:<18} {seal:>9.2} {open:>9.2} |", backend.name(), suite.name());
            for record_bytes in [64 << 10, 256 << 10, 1 << 20] {
                let mut writer = fixed_key::writer(Box::new(Sink), suite, backend, record_bytes, KeyLimits::default())?;
                let mut at = 0;
                let rate = measure(FRAME as usize, || {
                    let slice = ram.slice_at(at, FRAME);
                    at = (at + FRAME) % RAM;
                    drop(slice.map(|slice| writer.write_all(b"", &[slice])));
                });
                print!(" {rate:>6.2}");
            }
            println!();
        }
    }
    Ok(())
}
