//! Guest RAM: mapped by this crate ([`MappedRam`]), or by a VMM that uses vm-memory
//! ([`VmMemoryRam`]) or has its own memory ([`BackedRam`]).

use std::{fmt, fs, io, path::Path, str::FromStr};

use thiserror::Error;

mod backed;
#[allow(unsafe_code)]
mod map;
#[allow(unsafe_code)]
mod mapped;
#[allow(unsafe_code)]
pub(crate) mod pagemap;
mod range;
#[cfg(feature = "vm-memory")]
#[allow(unsafe_code)]
mod vm_memory;

pub use backed::{BackedRam, MemoryFile, RegionBacking};
pub use mapped::MappedRam;
#[cfg(feature = "vm-memory")]
pub use vm_memory::{VmMemoryBitmap, VmMemoryError, VmMemoryRam};

/// The size in bytes of a huge page. This crate uses only one size.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// The kind of memory behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory with pages of 4 KiB: `anon`.
    #[default]
    Anonymous,
    /// Private anonymous memory for which the kernel should use pages of 2 MiB where it can: `thp`.
    TransparentHuge,
    /// A shared memory file, which another process can map, too: `memfd`. It has pages of 4 KiB. It
    /// also has pages of 2 MiB if the kernel may use them for shared memory on request (`advise` or
    /// more in `/sys/kernel/mm/transparent_hugepage/shmem_enabled`).
    Memfd,
    /// A shared memory file with pages of 2 MiB from the reserve in `/proc/sys/vm/nr_hugepages`:
    /// `hugetlb`.
    Hugetlb,
}

impl Backing {
    /// All backings.
    pub const ALL: [Self; 4] = [Self::Anonymous, Self::TransparentHuge, Self::Memfd, Self::Hugetlb];

    /// Returns the short name, which `FromStr` parses and `Display` writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anon",
            Self::TransparentHuge => "thp",
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb",
        }
    }

    /// Returns whether pages of 2 MiB are possible with the kernel's current settings. (Whether a
    /// page is huge depends on the free memory.)
    pub fn may_be_huge(self) -> bool {
        match self {
            Self::Anonymous => false,
            Self::TransparentHuge | Self::Hugetlb => true,
            Self::Memfd => {
                let folder = Path::new("/sys/kernel/mm/transparent_hugepage");
                let setting = |name: &str| fs::read_to_string(folder.join(name)).ok();
                let Some(all) = setting("shmem_enabled") else { return false };
                // before Linux 6.10 there is no setting for each size
                shared_may_be_huge(&all, setting("hugepages-2048kB/shmem_enabled").as_deref())
            }
        }
    }

    /// Returns whether other processes can map the memory, because it is a file.
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Memfd | Self::Hugetlb)
    }
}

/// Returns whether the kernel uses pages of 2 MiB for shared memory on request. `all` is the setting
/// for all sizes, and `own` the one for this size. The words in brackets are in effect.
fn shared_may_be_huge(all: &str, own: Option<&str>) -> bool {
    let own = own.filter(|own| !own.contains("[inherit]"));
    let never = own.unwrap_or(all).contains("[never]");
    !all.contains("[deny]") && (all.contains("[force]") || !never)
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The error for a name that is not in a fixed list.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{given:?} is not a {kind}; use one of: {known}")]
pub struct UnknownName {
    /// The given name.
    pub given: String,
    /// The kind of thing that it should name.
    pub kind: &'static str,
    /// The valid names.
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

/// The reason why guest RAM could not be mapped, populated or discarded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamError {
    /// The length of a hugetlb region is no multiple of 2 MiB.
    #[error("RAM region {index} has {len:#x} bytes; with hugetlb a length must be a multiple of 2 MiB")]
    HugeLength {
        /// The index of the region in the layout.
        index: usize,
        /// The length of the region in bytes.
        len: u64,
    },
    /// The reserve of huge pages is too small. No page stays mapped or reserved.
    #[error("{needed} huge pages of 2 MiB needed but only {free} are free: raise /proc/sys/vm/nr_hugepages")]
    NoHugePages {
        /// The number of pages that the whole layout needs.
        needed: u64,
        /// The number of pages that were neither used nor reserved by others.
        free: u64,
    },
    /// A memory file is missing, superfluous, or has another length than its region.
    #[error("memory file {index} has {size:#x} bytes but {len:#x} are needed")]
    FileSize {
        /// The index of the region in the layout.
        index: usize,
        /// The length of the region in bytes; 0 if there are too many files.
        len: u64,
        /// The length of the file in bytes; 0 if it is missing.
        size: u64,
    },
    /// The length of a memory file could still change. An access beyond its end would kill the
    /// process.
    #[error("memory file {0} is not sealed against shrinking and growing")]
    Unsealed(usize),
    /// A file is no memory file (`memfd_create`) with the page size of the backing.
    #[error("file {index} is no memory file with the page size of {backing}")]
    NotMemory {
        /// The index of the region in the layout.
        index: usize,
        /// The backing.
        backing: Backing,
    },
    /// The number of named backings differs from the number of regions.
    #[error("backings are named for {named} regions of RAM, there are {regions}")]
    Regions {
        /// The number of backings that were named.
        named: usize,
        /// The number of regions.
        regions: usize,
    },
    /// The regions of a VM have backings of several kinds.
    #[error("RAM is backed by {first} and by {other}: a pager serves one of them")]
    Mixed {
        /// The backing of the first region.
        first: Backing,
        /// Another backing.
        other: Backing,
    },
    /// A region does not begin with a whole page of its file.
    #[error("RAM region {index} begins at byte {offset:#x} of its file, which is not a multiple of {page_size:#x}")]
    Offset {
        /// The index of the region in the layout.
        index: usize,
        /// The offset of the region in the file, in bytes.
        offset: u64,
        /// The size of the pages of the file, in bytes.
        page_size: u64,
    },
    /// Memory of this backing is private to a process.
    #[error("memory backed by {0} cannot be shared with another process: memfd or hugetlb can")]
    NotShared(Backing),
    /// Some of the pages are outside guest RAM.
    #[error("pages {first}+{count} are not inside guest RAM")]
    Outside {
        /// The number of the first page.
        first: u64,
        /// The number of pages.
        count: u64,
    },
    /// A system call failed.
    #[error("guest RAM: {what}")]
    System {
        /// The action that failed.
        what: &'static str,
        /// The cause.
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
        assert_eq!(Backing::ALL.map(Backing::is_shared), [false, false, true, true]);
        assert!(!Backing::Anonymous.may_be_huge());
        assert!(Backing::TransparentHuge.may_be_huge() && Backing::Hugetlb.may_be_huge());
    }

    #[test]
    fn the_setting_of_the_size_counts_unless_it_inherits() {
        for (all, own, may) in [
            ("always within_size advise [never] deny force", None, false),
            ("always within_size [advise] never deny force", None, true),
            ("always within_size advise never deny [force]", None, true),
            ("always within_size advise never [deny] force", None, false),
            ("always within_size advise [never] deny force", Some("always [inherit] never"), false),
            ("always within_size [advise] never deny force", Some("always [inherit] never"), true),
            ("always within_size advise [never] deny force", Some("[always] inherit never"), true),
            ("always within_size [advise] never deny force", Some("always inherit [never]"), false),
            ("always within_size advise never deny [force]", Some("always inherit [never]"), true),
            ("always within_size advise never [deny] force", Some("[always] inherit never"), false),
        ] {
            assert_eq!(shared_may_be_huge(all, own), may, "{all}, {own:?}");
        }
    }
}
