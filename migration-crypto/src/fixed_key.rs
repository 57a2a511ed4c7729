//! Records under a fixed, public key, for benches and fuzz targets.

use std::{io, sync::Arc};

use migration_core::channel::{ReadHalf, WriteHalf};

use crate::{
    Suite,
    aead::Backend,
    channel::{SecureReader, SecureWriter},
    record::{KeyLimits, RecordOpener, RecordSealer},
    secret::Secret,
};

const KEY: [u8; 32] = [1; 32];

/// Seals what is written to it into `inner`, in records of at most `record_bytes`.
pub fn writer(
    inner: Box<dyn WriteHalf>,
    suite: Suite,
    backend: &'static dyn Backend,
    record_bytes: usize,
    limits: KeyLimits,
) -> io::Result<impl WriteHalf> {
    let sealer = RecordSealer::new(suite, backend, Secret::new(KEY), limits)?;
    Ok(SecureWriter::new(inner, sealer, record_bytes, Arc::default()))
}

/// Opens the records that are read from `inner`.
pub fn reader(inner: Box<dyn ReadHalf>, suite: Suite, backend: &'static dyn Backend) -> io::Result<impl ReadHalf> {
    Ok(SecureReader::new(inner, RecordOpener::new(suite, backend, Secret::new(KEY))?))
}
