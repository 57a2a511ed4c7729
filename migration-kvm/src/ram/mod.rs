//! Guest RAM: mapped by this crate ([`MappedRam`]), or by a VMM that uses vm-memory ([`VmMemoryRam`]).

use std::{fmt, fs, io, path::Path, str::FromStr};

use thiserror::Error;

#[allow(unsafe_code)]
mod map;
#[allow(unsafe_code)]
mod mapped;
#[allow(unsafe_code)]
pub(crate) mod pagemap;
#[cfg(feature = "vm-memory")]
#[allow(unsafe_code)]
mod vm_memory;

pub use mapped::MappedRam;
#[cfg(feature = "vm-memory")]
pub use vm_memory::{VmMemoryBitmap, VmMemoryError, VmMemoryRam};

/// Bytes in a huge page, of the only size that this crate uses.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// What backs guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory of 4 KiB pages: `anon`.
    #[default]
    Anonymous,
    /// Private anonymous memory for which the kernel is asked to use 2 MiB pages where it can: `thp`.
    TransparentHuge,
    /// A shared memory file, which another process can map too: `memfd`. In pages of 4 KiB, and of 2 MiB where the kernel may use them
    /// for shared memory on request (`advise` or more in `/sys/kernel/mm/transparent_hugepage/shmem_enabled`).
    Memfd,
    /// A shared memory file of 2 MiB pages out of the reserve in `/proc/sys/vm/nr_hugepages`: `hugetlb`.
    Hugetlb,
}

impl Backing {
    /// Every backing.
    pub const ALL: [Self; 4] = [Self::Anonymous, Self::TransparentHuge, Self::Memfd, Self::Hugetlb];

    /// The short name, as `FromStr` reads it and `Display` writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anon",
            Self::TransparentHuge => "thp",
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb",
        }
    }

    /// Whether its pages may be of 2 MiB, as the kernel is set now. (Whether one is depends on the memory that is free.)
    pub fn may_be_huge(self) -> bool {
        match self {
            Self::Anonymous => false,
            Self::TransparentHuge | Self::Hugetlb => true,
            Self::Memfd => {
                let folder = Path::new("/sys/kernel/mm/transparent_hugepage");
                let setting = |name: &str| fs::read_to_string(folder.join(name)).ok();
                let Some(all) = setting("shmem_enabled") else { return false };
                // before Linux 6.10 there is no setting for each size
                let own = setting("hugepages-2048kB/shmem_enabled").filter(|own| !own.contains("[inherit]"));
                let never = own.as_ref().unwrap_or(&all).contains("[never]");
                !all.contains("[deny]") && (all.contains("[force]") || !never)
            }
        }
    }

    /// Whether other processes can map the memory (it is a file).
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Memfd | Self::Hugetlb)
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is not one of a fixed list.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{given:?} is not a {kind}; there are: {known}")]
pub struct UnknownName {
    /// What was given.
    pub given: String,
    /// What it should have named.
    pub kind: &'static str,
    /// The names there are.
    pub known: &'static str,
}

impl FromStr for Backing {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|b| b.name() == name).ok_or_else(|| UnknownName {
            given: name.to_owned(),
            kind: "memory backing",
            known: "anon, thp, memfd, hugetlb",
        })
    }
}

/// Guest RAM could not be mapped, warmed or discarded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamError {
    /// A region of hugetlb memory must be a whole number of 2 MiB pages.
    #[error("RAM region {index} has {len:#x} bytes; with hugetlb a length must be a multiple of 2 MiB")]
    HugeLength {
        /// Which region of the layout.
        index: usize,
        /// Its length in bytes.
        len: u64,
    },
    /// The reserve of huge pages is too small. Nothing stays mapped or reserved.
    #[error("{needed} huge pages of 2 MiB needed but only {free} are free: raise /proc/sys/vm/nr_hugepages")]
    NoHugePages {
        /// Pages that the whole layout needs.
        needed: u64,
        /// Pages that were neither used nor reserved by others.
        free: u64,
    },
    /// There must be one memory file a region, of the region's length.
    #[error("memory file {index} has {size:#x} bytes but {len:#x} are needed")]
    FileSize {
        /// Which region of the layout.
        index: usize,
        /// The region's length in bytes; zero when there are too many files.
        len: u64,
        /// The file's length in bytes; zero when it is missing.
        size: u64,
    },
    /// A memory file's length could still change: an access beyond its end kills the process.
    #[error("memory file {0} is not sealed against shrinking and growing")]
    Unsealed(usize),
    /// A file is something else than a memory file (`memfd_create`) with the backing's page size.
    #[error("file {index} is no memory file with pages as {backing} has them")]
    NotMemory {
        /// Which region of the layout.
        index: usize,
        /// What was to be mapped.
        backing: Backing,
    },
    /// Memory of this backing is private to a process.
    #[error("memory backed by {0} cannot be shared with another process: memfd or hugetlb can")]
    NotShared(Backing),
    /// The pages asked for are not all RAM.
    #[error("pages {first}+{count} are not inside guest RAM")]
    Outside {
        /// Number of the first page.
        first: u64,
        /// How many.
        count: u64,
    },
    /// A system call failed.
    #[error("guest RAM: {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl RamError {
    pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for backing in Backing::ALL {
            assert_eq!(backing.to_string().parse(), Ok(backing));
        }
        assert!("huge".parse::<Backing>().unwrap_err().to_string().contains("thp"));
    }
}
