//! Records that are meddled with on their way.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use migration_core::{
    RamSlice,
    channel::{ReadHalf, WriteHalf},
};
use migration_crypto::{KeyLimits, Suite, aead::RustCrypto, fixed_key};

use crate::handshake::Told;

/// Most records of a stream.
const MOST: usize = 64;
/// Keys change often.
const LIMITS: KeyLimits = KeyLimits { records: 3, bytes: 1 << 20, keys: u32::MAX };

/// Two bytes for each record: what happens to it (nothing, a bit flipped, dropped, sent twice, cut
/// short, something put before it, the one before in its place), and where.
pub fn check(input: &[u8]) {
    let steps: Vec<[u8; 2]> = input.as_chunks().0.iter().copied().take(MOST).collect();
    let records = Arc::new(Mutex::new(Vec::new()));
    let sink = Box::new(Sink(records.clone()));
    let Ok(mut writer) = fixed_key::writer(sink, Suite::Aes128Gcm, &RustCrypto, 1 << 16, LIMITS) else { return };
    let mut sent = Vec::new();
    for n in 0..steps.len() {
        let text: Vec<u8> = (0..=n as u8).collect();
        writer.write_all(&text, &[]).expect("sealing goes on");
        sent.extend(text);
    }
    drop(writer);
    let records = std::mem::take(&mut *records.lock().unwrap_or_else(|e| e.into_inner()));
    let (mut wire, mut meddled) = (Vec::new(), false);
    for (n, record) in records.iter().enumerate() {
        let [what, at] = steps.get(n).copied().unwrap_or([0, 0]);
        let at = usize::from(at) % record.len();
        meddled |= what % 7 != 0;
        match what % 7 {
            1 => {
                let mut changed = record.clone();
                changed[at] ^= 1 << (what / 7 % 8);
                wire.extend(changed);
            }
            2 => {}
            3 => wire.extend([&record[..], record].concat()),
            4 => wire.extend(&record[..at]),
            5 => wire.extend([&input[..at.min(input.len())], record, &[what]].concat()),
            6 if n > 0 => wire.extend(&records[n - 1]),
            6 => meddled = true,
            _ => wire.extend(record),
        }
    }
    let reader = Box::new(Told(io::Cursor::new(wire)));
    let Ok(mut reader) = fixed_key::reader(reader, Suite::Aes128Gcm, &RustCrypto) else { return };
    let (mut got, mut byte) = (Vec::new(), [0]);
    let end = loop {
        match reader.read_exact(&mut byte) {
            Ok(()) => got.push(byte[0]),
            Err(error) => break error,
        }
    };
    assert!(sent.starts_with(&got), "bytes came out that were not sent there");
    let in_order = end.to_string().contains("closed the connection");
    assert_eq!(in_order, got == sent && !meddled, "{end}");
}

struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);

impl WriteHalf for Sink {
    fn write_all(&mut self, head: &[u8], _: &[RamSlice<'_>]) -> io::Result<()> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(head.to_vec());
        Ok(())
    }

    fn set_idle_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}
