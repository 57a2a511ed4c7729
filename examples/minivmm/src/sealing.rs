//! Seals the files of a VM and its pages in page stores, if this minivmm has a key
//! (`--seal-key-file`).

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::Arc,
};

use migration_core::{
    store::{PageStore, VersionStore},
    text::describe,
    vm::VmId,
};
use migration_crypto::{Psk, Sealed, SealedVersions, Suite, aead};
use minivmm_client::values::absolute;
use serde::{Deserialize, Serialize};

/// The data that a broker passes to a minivmm that restarts a VM from a snapshot.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Restart {
    pub(crate) vm: [u8; 16],
    /// The key file of the snapshot. The VM itself may be sealed with another key.
    pub(crate) key: Option<PathBuf>,
}

/// The seal key, with the path of its file. `None` if this minivmm seals nothing.
#[derive(Default)]
pub(crate) struct Sealing(Option<(PathBuf, Psk)>);

impl Sealing {
    /// Loads the key from `file`. Nothing is sealed if `file` is `None`.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self, String> {
        let load = |file: &Path| {
            let path = absolute(file)?;
            // other processes get the path in JSON, which must be Unicode
            path.to_str().ok_or_else(|| format!("{}: the path of a key must be Unicode", path.display()))?;
            Ok((path, Psk::load(file).map_err(describe)?))
        };
        file.map(load).transpose().map(Self)
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.0.as_ref().map(|(file, _)| file.as_path())
    }

    /// Returns the page store to use: `store` itself, or `store` behind encryption if there is a
    /// key.
    pub(crate) fn page_store(&self, store: Arc<dyn PageStore>) -> Arc<dyn PageStore> {
        match &self.0 {
            None => store,
            Some((_, key)) => Arc::new(Sealed::new(store, key.clone(), Suite::Aes256Gcm, aead::best())),
        }
    }

    /// Creates a store for a VM of `pages` pages. `make` gets the number of pages for which the
    /// underlying store must have room.
    pub(crate) fn create<S: VersionStore + 'static>(
        &self,
        vm: VmId,
        pages: u64,
        make: impl FnOnce(u64) -> io::Result<S>,
    ) -> io::Result<Box<dyn VersionStore>> {
        let Some((_, key)) = &self.0 else { return Ok(Box::new(make(pages)?)) };
        let store = Box::new(make(SealedVersions::store_pages(pages))?);
        Ok(Box::new(SealedVersions::create(store, pages, key, vm, Suite::Aes256Gcm, aead::best())?))
    }

    /// Opens the store of a saved VM that has at most `pages` pages. If the store is sealed and
    /// `vm` is given, it must be the store of that VM. `open` gets the most pages that the
    /// underlying store may have.
    pub(crate) fn open<S: VersionStore + 'static>(
        &self,
        vm: Option<VmId>,
        pages: u64,
        open: impl FnOnce(u64) -> io::Result<S>,
    ) -> io::Result<Box<dyn VersionStore>> {
        if let Some((_, key)) = &self.0 {
            let store = Box::new(open(SealedVersions::store_pages(pages))?);
            return Ok(Box::new(SealedVersions::open(store, pages, vm, key, aead::best())?));
        }
        // A sealed store has more pages than its VM. They are allowed here, so that the error is
        // not about the size but about the seal.
        let store = open(SealedVersions::store_pages(pages))?;
        if store.latest().is_some_and(|(_, state)| SealedVersions::is_sealed(&state)) {
            return Err(io::Error::new(ErrorKind::PermissionDenied, "it is sealed: name its key by --seal-key-file"));
        }
        Ok(Box::new(store))
    }
}
