//! Sealed pages in sparse files, as the conformance suite tests them.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

use migration_core::store::ManualClock;
use migration_transport::{FilePageStore, FilePageStoreOptions};
use tempfile::TempDir;

use super::*;

/// Bytes of an entry of the table, and of the header before the first entry.
const ENTRY: usize = 128;
const HEADER: u64 = 4096;

struct SealedInFiles {
    parent: TempDir,
    clock: Arc<ManualClock>,
    store: Sealed<FilePageStore>,
    names: Vec<(Namespace, VmId)>,
}

impl SealedInFiles {
    fn new() -> Self {
        let parent = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::default());
        clock.advance(Duration::from_secs(1_000_000_000));
        let store = open(&parent, &clock);
        Self { parent, clock, store, names: Vec::new() }
    }

    fn file(&self, namespace: NamespaceId, kind: &str) -> File {
        let path = folder(&self.parent).join(format!("{namespace}.{kind}"));
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }
}

fn folder(parent: &TempDir) -> PathBuf {
    parent.path().join("pages")
}

fn open(parent: &TempDir, clock: &Arc<ManualClock>) -> Sealed<FilePageStore> {
    let options = FilePageStoreOptions { limit: Some(4 << 20), synchronise: false, max_namespaces: 20 };
    let files = FilePageStore::open_with_clock(&folder(parent), "files", options, clock.clone()).unwrap();
    Sealed::new(files, Psk::new([7; 32]), Suite::Aes256Gcm, aead::best())
}

impl TestStore for SealedInFiles {
    fn store(&self) -> &dyn PageStore {
        &self.store
    }

    fn introduce(&mut self, name: &Namespace, vm: VmId) {
        self.store.add(name, vm).unwrap();
        self.names.push((name.clone(), vm));
    }

    fn max_namespaces(&self) -> usize {
        20
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
    }

    fn crash_user(&mut self) {
        self.store = open(&self.parent, &self.clock);
        for (name, vm) in &self.names {
            self.store.add(name, *vm).unwrap();
        }
    }

    fn lose_everything(&mut self) {
        fs::remove_dir_all(folder(&self.parent)).unwrap();
        self.crash_user();
    }

    fn harm(&mut self, namespace: NamespaceId, page: u64, harm: Harm) -> bool {
        let (table, pages) = (self.file(namespace, "table"), self.file(namespace, "pages"));
        let value_at = |page: u64| page * PAGE_SIZE as u64;
        let entry_at = |page: u64| HEADER + page * ENTRY as u64;
        let mut value = [0; PAGE_SIZE];
        match harm {
            Harm::Lose => pages.write_all_at(&value, value_at(page)).unwrap(),
            Harm::Damage => {
                pages.read_exact_at(&mut value, value_at(page)).unwrap();
                value[2000] ^= 1;
                pages.write_all_at(&value, value_at(page)).unwrap();
            }
            Harm::LoseTrailer => table.write_all_at(&[0; ENTRY], entry_at(page)).unwrap(),
            Harm::MixUp(other) => {
                let mut entry = [0; ENTRY];
                pages.read_exact_at(&mut value, value_at(other)).unwrap();
                pages.write_all_at(&value, value_at(page)).unwrap();
                table.read_exact_at(&mut entry, entry_at(other)).unwrap();
                table.write_all_at(&entry, entry_at(page)).unwrap();
            }
        }
        true
    }
}

migration_core::page_store_conformance!(SealedInFiles::new);
