//! What of a VM rests in files: sealed, if this minivmm has a key for that (`--seal-key-file`).

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

/// What a broker knows of a VM that it restarts from a snapshot.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Restart {
    pub(crate) vm: [u8; 16],
    /// Of the snapshot; the VM's own may be another one.
    pub(crate) key: Option<PathBuf>,
}

/// The key, and the file that it is in.
#[derive(Default)]
pub(crate) struct Sealing(Option<(PathBuf, Psk)>);

impl Sealing {
    /// Seals nothing if no file is named.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self, String> {
        let load = |file: &Path| {
            let path = absolute(file)?;
            // other processes are told of it in JSON
            path.to_str().ok_or_else(|| format!("{}: the path of a key must be Unicode", path.display()))?;
            Ok((path, Psk::load(file).map_err(describe)?))
        };
        file.map(load).transpose().map(Self)
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.0.as_ref().map(|(file, _)| file.as_path())
    }

    /// Returns the page store as it is used: sealed, if there is a key.
    pub(crate) fn page_store(&self, store: Arc<dyn PageStore>) -> Arc<dyn PageStore> {
        match &self.0 {
            None => store,
            Some((_, key)) => Arc::new(Sealed::new(store, key.clone(), Suite::Aes256Gcm, aead::best())),
        }
    }

    /// Makes a store for a VM of so many pages. `make` is told how many the store has to have room
    /// for.
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

    /// Opens what rests of a VM that has so many pages at the most, and is that one if it is known.
    /// `open` is told how many the store may have.
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
        // a sealed one has more pages, which is not what is wrong with it
        let store = open(SealedVersions::store_pages(pages))?;
        if store.latest().is_some_and(|(_, state)| SealedVersions::is_sealed(&state)) {
            return Err(io::Error::new(ErrorKind::PermissionDenied, "it is sealed: name its key by --seal-key-file"));
        }
        Ok(Box::new(store))
    }
}
