//! Sealed versions in a folder and on a shelf, as the conformance suite tests them.

use std::path::PathBuf;

use migration_core::store::conformance::versions::{TestVersions, VM_PAGES};
use tempfile::TempDir;

use super::*;

/// On a shelf that outlives the store.
struct OnShelf {
    shelf: Shelf,
    store: SealedVersions,
}

impl OnShelf {
    fn new() -> Self {
        let shelf = Shelf::default();
        Self { store: create(shelf.clone(), VM_PAGES), shelf }
    }
}

impl TestVersions for OnShelf {
    fn store(&mut self) -> &mut dyn VersionStore {
        &mut self.store
    }

    fn reopen(&mut self) -> bool {
        let committed = self.shelf.latest().is_some();
        if committed {
            self.shelf.discard();
            self.store = self.shelf.open().unwrap();
        }
        committed
    }
}

migration_core::version_store_conformance!(OnShelf::new);

mod in_folder {
    use super::*;

    struct InFolder {
        store: Option<SealedVersions>,
        dir: PathBuf,
        _parent: TempDir,
    }

    impl InFolder {
        fn new() -> Self {
            let parent = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            let dir = parent.path().join("vm");
            let inner = DirVersions::create(&dir, SealedVersions::store_pages(VM_PAGES)).unwrap();
            Self { store: Some(create(inner, VM_PAGES)), dir, _parent: parent }
        }
    }

    impl TestVersions for InFolder {
        fn store(&mut self) -> &mut dyn VersionStore {
            self.store.as_mut().unwrap()
        }

        fn reopen(&mut self) -> bool {
            let committed = self.store.take().is_some_and(|store| store.latest().is_some());
            let inner = DirVersions::open(&self.dir, SealedVersions::store_pages(VM_PAGES)).unwrap();
            self.store = Some(match committed {
                true => SealedVersions::open(Box::new(inner), VM_PAGES, Some(VM), &key(), aead::best()).unwrap(),
                false => create(inner, VM_PAGES),
            });
            committed
        }
    }

    migration_core::version_store_conformance!(InFolder::new);
}
