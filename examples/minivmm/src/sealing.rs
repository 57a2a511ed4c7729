//! What of a VM rests in files: sealed, if this minivmm has a key for that (`--seal-key-file`).

use std::{
    ffi::OsString,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    str::FromStr,
};

use migration_core::{checkpoint::CheckpointStore, vm::VmId};
use migration_crypto::{Psk, SealedStore, Suite, aead};
use serde::{Deserialize, Serialize};

use crate::cli::absolute;

/// A snapshot to go on from.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(from = "Written", into = "Written")]
pub(crate) struct Saved {
    pub(crate) file: PathBuf,
    /// The file with the key that it is sealed by, if it is.
    pub(crate) key: Option<PathBuf>,
}

/// A plain one as other builds write it, which know no others.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Written {
    Plain(PathBuf),
    Sealed { file: PathBuf, key: PathBuf },
}

impl From<Written> for Saved {
    fn from(written: Written) -> Self {
        match written {
            Written::Plain(file) => Self { file, key: None },
            Written::Sealed { file, key } => Self { file, key: Some(key) },
        }
    }
}

impl From<Saved> for Written {
    fn from(Saved { file, key }: Saved) -> Self {
        match key {
            None => Self::Plain(file),
            Some(key) => Self::Sealed { file, key },
        }
    }
}

impl Saved {
    /// As an argument: a path, which is absolute, or JSON.
    pub(crate) fn argument(&self) -> Result<OsString, String> {
        match &self.key {
            None => Ok(self.file.clone().into()),
            Some(_) => serde_json::to_string(self).map(Into::into).map_err(|e| e.to_string()),
        }
    }
}

impl FromStr for Saved {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.starts_with('{') {
            true => serde_json::from_str(text),
            false => Ok(Self { file: text.into(), key: None }),
        }
    }
}

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
            Ok((path, Psk::load(file).map_err(|e| e.to_string())?))
        };
        file.map(load).transpose().map(Self)
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.0.as_ref().map(|(file, _)| file.as_path())
    }

    /// Makes a store for a VM of so many pages. `make` is told how many the store has to have room for.
    pub(crate) fn create<S: CheckpointStore + 'static>(
        &self,
        vm: VmId,
        pages: u64,
        make: impl FnOnce(u64) -> io::Result<S>,
    ) -> io::Result<Box<dyn CheckpointStore>> {
        let Some((_, key)) = &self.0 else { return Ok(Box::new(make(pages)?)) };
        let store = Box::new(make(SealedStore::store_pages(pages))?);
        Ok(Box::new(SealedStore::create(store, pages, key, vm, Suite::Aes256Gcm, aead::best())?))
    }

    /// Opens what rests of a VM that has so many pages at the most, and is that one if it is known. `open` is told how many the store
    /// may have.
    pub(crate) fn open<S: CheckpointStore + 'static>(
        &self,
        vm: Option<VmId>,
        pages: u64,
        open: impl FnOnce(u64) -> io::Result<S>,
    ) -> io::Result<Box<dyn CheckpointStore>> {
        if let Some((_, key)) = &self.0 {
            let store = Box::new(open(SealedStore::store_pages(pages))?);
            return Ok(Box::new(SealedStore::open(store, pages, vm, key, aead::best())?));
        }
        // a sealed one has more pages, which is not what is wrong with it
        let store = open(SealedStore::store_pages(pages))?;
        if store.latest().is_some_and(|(_, state)| SealedStore::is_sealed(&state)) {
            return Err(io::Error::new(ErrorKind::PermissionDenied, "it is sealed: name its key by --seal-key-file"));
        }
        Ok(Box::new(store))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_as_other_processes_write_them() {
        let plain = Saved { file: "/s".into(), key: None };
        let sealed = Saved { key: Some("/k".into()), ..plain.clone() };
        assert_eq!(serde_json::to_string(&plain).unwrap(), "\"/s\"");
        for saved in [plain, sealed] {
            assert_eq!(serde_json::from_str::<Saved>(&serde_json::to_string(&saved).unwrap()).unwrap(), saved);
            assert_eq!(saved.argument().unwrap().to_str().unwrap().parse::<Saved>().unwrap(), saved);
        }
    }
}
