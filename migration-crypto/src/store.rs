//! Checkpoints and snapshots that are sealed where they rest.
//!
//! The inner store's pages, a tree that is laid out top first:
//!
//! | pages | what |
//! |---|---|
//! | 0 | the top seal page: seals of the seal pages of the next level. Its own seal is in the state |
//! | then, level by level | seal pages, down to those with the seals of the VM's pages |
//! | behind them | the VM's pages, each its ciphertext; nothing for a page of zeros, whose seal is one over nothing |
//!
//! A seal is a nonce, a tag and a generation. A seal page holds 128 of them and is a ciphertext
//! itself.
//!
//! | the inner state | |
//! |---|---|
//! | in clear | magic, version, cipher, VM, its number of pages, generation |
//! | sealed | all of that again, number of the checkpoint, seal of page 0, the caller's state |

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, ErrorKind},
    mem,
    ops::Range,
};

use bytes::Bytes;
use migration_core::{
    PAGE_SIZE, PageSet,
    codec::{DecodeError, Reader, Writer},
    page::MAX_PAGES,
    state::MAX_STATE,
    store::{PageContent, VersionStore, check_version_read, not_in_version},
    vm::VmId,
};
use thiserror::Error;

use crate::{
    PageError, PageSealer, Psk, Purpose, SEAL_OVERHEAD, Suite,
    aead::{Backend, NONCE_LEN, TAG_LEN},
};

const MAGIC: [u8; 8] = *b"LMSEALED";
const VERSION: u32 = 1;
/// Bytes of [`Header`].
const HEADER_LEN: usize = 8 + 4 + 1 + 16 + 8 + 4;
/// Bytes of [`Seal`].
const SEAL_LEN: usize = SEAL_OVERHEAD + 4;
/// Seals in a seal page.
const SEALS: u64 = (PAGE_SIZE / SEAL_LEN) as u64;
/// Bytes of an inner state beside the caller's.
const STATE_OVERHEAD: usize = HEADER_LEN + SEAL_OVERHEAD + HEADER_LEN + 4 + SEAL_LEN;
/// The state is sealed as if it were this page, which no VM has.
const STATE_PAGE: u64 = u64::MAX;

/// Seals the checkpoints, or the snapshot, that another [`VersionStore`] keeps.
///
/// Who has the store but not the key can neither read what is kept nor change, exchange, leave out
/// or replay any page of it: every page has a seal, the seals lie in sealed pages, and so on up to
/// one seal in the sealed state. What is not authentic is refused before it reaches the caller.
///
/// The store still sees the number of the VM's pages, [which VM](VmId) it is, the cipher, the
/// length of the state, which pages were put and when, and which of these are zeros. It can lose a
/// checkpoint, and it can hand out, whole, **an older one** of the same VM and key, also one of
/// another store. Whoever opens it must compare its number, or what its state says, with what is
/// expected.
///
/// The inner store must have room for [`store_pages`](Self::store_pages), and a state may have up
/// to [`MAX_STATE`](Self::MAX_STATE) bytes. In memory, each page takes 32 bytes, by 128 of which at
/// least one was put, from the first `put` or `restore` on.
///
/// After a failed `put` or `commit`, [`discard`](VersionStore::discard) must be called before the
/// next checkpoint can be taken.
///
/// # Example
///
/// ```
/// use migration_core::{PAGE_SIZE, store::VersionStore, vm::VmId};
/// use migration_crypto::{Psk, SealedVersions, Suite, aead};
/// use migration_transport::DirVersions;
///
/// # let parent = tempfile::tempdir()?;
/// # let dir = parent.path().join("vm-7");
/// // as a rule, of a file: `Psk::load`
/// let (key, vm) = (Psk::new([7; 32]), VmId([1; 16]));
/// let inner = Box::new(DirVersions::create(&dir, SealedVersions::store_pages(1024))?);
/// let mut store = SealedVersions::create(inner, 1024, &key, vm, Suite::Aes256Gcm, aead::best())?;
/// store.put(3, Some(&[7; PAGE_SIZE]))?;
/// store.put(4, None)?;
/// store.commit(1, b"state".as_slice().into())?;
/// drop(store);
///
/// // another process, later
/// let inner = Box::new(DirVersions::open(&dir, SealedVersions::store_pages(1024))?);
/// assert!(inner.latest().is_some_and(|(_, state)| SealedVersions::is_sealed(&state)));
/// let mut store = SealedVersions::open(inner, 1024, Some(vm), &key, aead::best())?;
/// assert_eq!(store.latest(), Some((1, b"state".as_slice().into())));
/// let mut pages = Vec::new();
/// store.restore(&mut |page, data| Ok(pages.push((page, data.is_some()))))?;
/// assert_eq!(pages, [(3, true), (4, false)]);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct SealedVersions {
    inner: Box<dyn VersionStore>,
    sealer: PageSealer,
    /// As of the last commit; its generation is 0 before the first.
    header: Header,
    latest: Option<(u32, Bytes)>,
    /// As of the last commit.
    tree: Tree,
    /// Whether `tree` has its seal pages, or only the seal of the top one.
    loaded: bool,
    /// Seal pages as they will be from the next commit on, where they differ.
    staged: SealPages,
    /// What is staged lacks something.
    failed: bool,
    /// A page on its way.
    buffer: Box<[u8; PAGE_SIZE]>,
}

impl SealedVersions {
    /// Most bytes in a state: as many as any store takes, less what is sealed beside it.
    pub const MAX_STATE: usize = MAX_STATE - STATE_OVERHEAD;

    /// Returns the number of pages the inner store of a VM with `vm_pages` pages must take: one
    /// more for each 128 of them, and a few.
    pub fn store_pages(vm_pages: u64) -> u64 {
        Layout::new(vm_pages).vm().end
    }

    /// Returns whether this state, which a store has handed out, is sealed: the checkpoint is of
    /// use only with its key.
    pub fn is_sealed(state: &[u8]) -> bool {
        state.starts_with(&MAGIC)
    }

    /// Begins with an inner store that has no checkpoint yet. `vm` has `vm_pages` pages: no page at
    /// or beyond that is taken. Keys are derived from `master` for this VM, so any number of VMs
    /// and stores may have the same.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] when there is a checkpoint; [`ErrorKind::InvalidInput`] when
    /// the VM has more than [`MAX_PAGES`]; when the operating system has no random bytes to give.
    pub fn create(
        inner: Box<dyn VersionStore>,
        vm_pages: u64,
        master: &Psk,
        vm: VmId,
        suite: Suite,
        backend: &dyn Backend,
    ) -> io::Result<Self> {
        if vm_pages > MAX_PAGES {
            let why = format!("{vm_pages} pages, more than the {MAX_PAGES} that a VM can have");
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        if inner.latest().is_some() {
            let why = "the store has a checkpoint already: open it, or take an empty store";
            return Err(io::Error::new(ErrorKind::AlreadyExists, why));
        }
        let header = Header { suite, vm, vm_pages, generation: 0 };
        let sealer = sealer(&header, master, backend)?;
        Ok(Self::new(inner, sealer, header, None, None))
    }

    /// Opens what [`create`](Self::create) began and a commit has finished, for reading and for
    /// further checkpoints. The VM may have `max_pages` pages at the most, and must be `expected`
    /// if that is given; otherwise [`vm`](Self::vm) tells which it is.
    ///
    /// Only the state is read and checked now. The pages are when they are
    /// [restored](VersionStore::restore).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when nothing was committed; [`ErrorKind::InvalidData`] when it is
    /// not sealed, of a version that is not known, too large, or another VM's;
    /// [`ErrorKind::PermissionDenied`] when this key does not open it: it is the wrong one, or what
    /// is kept was changed. When the operating system has no random bytes to give.
    pub fn open(
        inner: Box<dyn VersionStore>,
        max_pages: u64,
        expected: Option<VmId>,
        master: &Psk,
        backend: &dyn Backend,
    ) -> io::Result<Self> {
        let Some((number, state)) = inner.latest() else {
            let why = "the store has no checkpoint: there is nothing to open, a new one is to be created";
            return Err(io::Error::new(ErrorKind::NotFound, why));
        };
        if !Self::is_sealed(&state) {
            return Err(invalid("the checkpoint is not sealed: open it without a key"));
        }
        let mut r = Reader::new(&state);
        let header = Header::decode(&mut r).map_err(invalid)?;
        let Header { vm, vm_pages, .. } = header;
        if let Some(expected) = expected.filter(|&expected| expected != vm) {
            return Err(invalid(format!("the checkpoint is of VM {vm}, not of VM {expected}")));
        }
        if vm_pages > max_pages.min(MAX_PAGES) {
            return Err(invalid(format!("a VM of {vm_pages} pages, {max_pages} are allowed")));
        }
        let nonce = r.array("nonce").map_err(invalid)?;
        let mut sealed = state[state.len() - r.remaining()..].to_vec();

        let sealer = sealer(&header, master, backend)?;
        let not_ours = |cause| {
            let what = "the checkpoint is not what was sealed with this key: another key is needed, or it was changed";
            io::Error::new(ErrorKind::PermissionDenied, Refused { what: what.to_owned(), cause })
        };
        let plain =
            sealer.open_in_place(STATE_PAGE, header.generation.into(), &nonce, &mut sealed).map_err(not_ours)?;
        let mut r = Reader::new(plain);
        let (copy, sealed_number) = (r.array("header").map_err(invalid)?, r.u32("number").map_err(invalid)?);
        if copy != header.encode() || sealed_number != number {
            return Err(not_ours(PageError::NotAuthentic));
        }
        let root = Seal::decode(&r.array("seal").map_err(invalid)?);
        let own = plain.len() - r.remaining()..plain.len();
        let state = Bytes::from(sealed).slice(own);
        Ok(Self::new(inner, sealer, header, root, Some((number, state))))
    }

    /// Which VM it is.
    pub fn vm(&self) -> VmId {
        self.header.vm
    }

    /// Returns the number of pages the VM has.
    pub fn pages(&self) -> u64 {
        self.header.vm_pages
    }

    fn new(
        inner: Box<dyn VersionStore>,
        sealer: PageSealer,
        header: Header,
        root: Option<Seal>,
        latest: Option<(u32, Bytes)>,
    ) -> Self {
        Self {
            inner,
            sealer,
            tree: Tree { layout: Layout::new(header.vm_pages), root, pages: SealPages::new() },
            loaded: root.is_none(),
            header,
            latest,
            staged: SealPages::new(),
            failed: false,
            buffer: Box::new([0; PAGE_SIZE]),
        }
    }

    fn usable(&self) -> io::Result<()> {
        match self.failed {
            false => Ok(()),
            true => Err(io::Error::other("a part of this checkpoint could not be kept: it must be discarded")),
        }
    }

    fn next_generation(&self) -> io::Result<u32> {
        self.header.generation.checked_add(1).ok_or_else(|| io::Error::other("generations ran out: begin a new store"))
    }

    /// Reads the seal pages of the last checkpoint, once.
    fn load(&mut self) -> io::Result<()> {
        if self.loaded {
            return Ok(());
        }
        let Self { inner, sealer, tree, .. } = self;
        let first = tree.layout.vm().start;
        let (mut next, mut done) = (0, false);
        let read = inner.restore(&mut |page, data| {
            if page >= first {
                done = true;
                return Err(io::Error::other("seal pages are all that is needed now"));
            }
            let seal = tree.expect(next, page)?;
            let content =
                seal.open(sealer, page, data, &mut [0; SEALED_LEN], &tree.layout)?.map(|data| Box::new(*data));
            let content = content.ok_or_else(|| tree.layout.refused(page, PageError::NotAuthentic))?;
            tree.pages.insert(page, content);
            // not before: a page that was refused is one that is missing, whatever the store makes
            // of an error
            next = page + 1;
            Ok(())
        });
        let all = match read {
            Err(error) if !done => Err(error),
            _ => tree.nothing_missing(next, first),
        };
        self.loaded = all.is_ok();
        if !self.loaded {
            self.tree.pages.clear();
        }
        all
    }

    fn stage(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        let generation = self.next_generation()?;
        let vm = self.tree.layout.vm();
        let Some(at) = vm.start.checked_add(page).filter(|at| vm.contains(at)) else {
            let why = format!("page {page} of a VM with {}", self.header.vm_pages);
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        };
        self.load()?;
        let seal = match data {
            None => Seal::new(&mut self.sealer, at, generation, &mut [])?,
            Some(data) => {
                *self.buffer = *data;
                Seal::new(&mut self.sealer, at, generation, &mut self.buffer[..])?
            }
        };
        self.inner.put(at, data.map(|_| &*self.buffer))?;
        self.set_seal(at, seal);
        Ok(())
    }

    /// In the seal page that has it, which differs from then on.
    fn set_seal(&mut self, page: u64, seal: Seal) {
        let Some((above, slot)) = self.tree.layout.seal_of(page) else { return };
        let committed = &self.tree.pages;
        let seals = self
            .staged
            .entry(above)
            .or_insert_with(|| committed.get(&above).cloned().unwrap_or_else(|| Box::new([0; PAGE_SIZE])));
        if let Some(place) = seals.as_chunks_mut().0.get_mut(slot) {
            *place = seal.encode();
        }
    }

    /// Puts what differs of the seal pages, from the lowest level up; the seal of the top one.
    fn put_seals(&mut self, generation: u32) -> io::Result<Option<Seal>> {
        let mut root = self.tree.root;
        for level in self.tree.layout.seal_pages().rev() {
            let mut next = level.start;
            while let Some((&page, seals)) = self.staged.range(next..level.end).next() {
                *self.buffer = **seals;
                let seal = Seal::new(&mut self.sealer, page, generation, &mut self.buffer[..])?;
                self.inner.put(page, Some(&self.buffer))?;
                self.set_seal(page, seal);
                if page == TOP {
                    root = Some(seal);
                }
                next = page + 1; // below the end
            }
        }
        Ok(root)
    }

    fn sealed_state(&mut self, header: Header, number: u32, root: Option<Seal>, state: &[u8]) -> io::Result<Bytes> {
        let head = header.encode();
        let mut w = Writer::new();
        w.bytes(&head).bytes(&[0; NONCE_LEN]);
        w.bytes(&head).u32(number).bytes(&root.map_or([0; SEAL_LEN], Seal::encode)).bytes(state);
        let mut bytes = w.into_bytes();
        let (clear, content) = bytes.split_at_mut(HEADER_LEN + NONCE_LEN);
        let sealed = self.sealer.seal_in_place(STATE_PAGE, header.generation.into(), content);
        let (nonce, tag) = sealed.map_err(io::Error::other)?;
        clear[HEADER_LEN..].copy_from_slice(&nonce);
        bytes.extend_from_slice(&tag);
        Ok(bytes.into())
    }
}

impl VersionStore for SealedVersions {
    fn put(&mut self, page: u64, data: PageContent<'_>) -> io::Result<()> {
        self.usable()?;
        // without this page it would not be a checkpoint, even if the caller went on
        self.stage(page, data).inspect_err(|_| self.failed = true)
    }

    fn commit(&mut self, number: u32, state: Bytes) -> io::Result<()> {
        self.usable()?;
        if state.len() > Self::MAX_STATE {
            let why = format!("a state of {} bytes, above the limit of {}, sealed", state.len(), Self::MAX_STATE);
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        self.failed = true;
        let header = Header { generation: self.next_generation()?, ..self.header };
        let root = self.put_seals(header.generation)?;
        let sealed = self.sealed_state(header, number, root, &state)?;
        self.inner.commit(number, sealed)?;
        self.failed = false;

        self.header = header;
        self.latest = Some((number, state));
        self.tree.root = root;
        // not `append`, which takes as long as both of them are: all of the VM, at each small
        // checkpoint
        self.tree.pages.extend(mem::take(&mut self.staged));
        Ok(())
    }

    fn discard(&mut self) {
        self.inner.discard();
        self.staged.clear();
        self.failed = false;
    }

    fn latest(&self) -> Option<(u32, Bytes)> {
        self.latest.clone()
    }

    fn list(&mut self) -> io::Result<PageSet> {
        self.load()?;
        let vm = self.tree.layout.vm();
        let mut set = PageSet::empty(self.header.vm_pages);
        let mut next = vm.start;
        while let Some((page, _)) = self.tree.first_sealed(next) {
            set.insert(page - vm.start);
            next = page + 1; // it has a seal, so it is none beyond the last
        }
        Ok(set)
    }

    /// Pages are handed out one by one as they prove authentic. What the inner store hands out
    /// beside them, in another order or twice, is refused.
    fn read(&mut self, pages: &[u64], take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        check_version_read(pages)?;
        self.load()?;
        let Self { inner, sealer, tree, .. } = self;
        let vm = tree.layout.vm();
        let mut wanted = Vec::with_capacity(pages.len());
        let mut seals = Vec::with_capacity(pages.len());
        for &page in pages {
            let at = vm.start.checked_add(page).filter(|at| vm.contains(at));
            let seal = at.and_then(|at| tree.seal(at)).ok_or_else(|| not_in_version(page))?;
            wanted.push(vm.start + page);
            seals.push(seal);
        }
        let mut next = 0;
        let mut buffer = [0; SEALED_LEN];
        inner.read(&wanted, &mut |page, data| {
            if wanted.get(next) != Some(&page) {
                let what = tree.layout.name(page);
                return Err(invalid(format!("{what}: the store has handed it out, and it was not its turn")));
            }
            let data = seals[next].open(sealer, page, data, &mut buffer, &tree.layout)?;
            take(page - vm.start, data)?;
            // not before: a page that was refused is one that is missing, whatever the store makes
            // of an error
            next += 1;
            Ok(())
        })?;
        match wanted.get(next) {
            Some(&missing) => Err(tree.missing(missing)),
            None => Ok(()),
        }
    }

    /// Pages are handed out one by one as they prove authentic. That none is missing is known only
    /// when this returns.
    fn restore(&mut self, take: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>) -> io::Result<()> {
        self.load()?;
        let Self { inner, sealer, tree, .. } = self;
        let vm = tree.layout.vm();
        let mut next = 0;
        let mut buffer = [0; SEALED_LEN];
        inner.restore(&mut |page, data| {
            let seal = tree.expect(next, page)?;
            let data = seal.open(sealer, page, data, &mut buffer, &tree.layout)?;
            // a seal page was read before, and is the same
            if let Some(page) = page.checked_sub(vm.start) {
                take(page, data)?;
            }
            next = page + 1; // it has a seal, so it is none beyond the last
            Ok(())
        })?;
        tree.nothing_missing(next, vm.end)
    }
}

impl fmt::Debug for SealedVersions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedVersions").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Ciphertext of a page and its tag.
const SEALED_LEN: usize = PAGE_SIZE + TAG_LEN;
/// The seal page of all seal pages.
const TOP: u64 = 0;

/// Seal pages in clear, by their number in the inner store.
type SealPages = BTreeMap<u64, Box<[u8; PAGE_SIZE]>>;

/// What authenticates a page, beside the key.
#[derive(Clone, Copy)]
struct Seal {
    nonce: [u8; NONCE_LEN],
    tag: [u8; TAG_LEN],
    /// Never 0, which stands for no seal.
    generation: u32,
}

impl Seal {
    /// Seals `content` in place.
    fn new(sealer: &mut PageSealer, page: u64, generation: u32, content: &mut [u8]) -> io::Result<Self> {
        let (nonce, tag) = sealer.seal_in_place(page, generation.into(), content).map_err(io::Error::other)?;
        Ok(Self { nonce, tag, generation })
    }

    /// What was sealed, if this is it.
    fn open<'a>(
        &self,
        sealer: &PageSealer,
        page: u64,
        data: PageContent<'_>,
        buffer: &'a mut [u8; SEALED_LEN],
        layout: &Layout,
    ) -> io::Result<PageContent<'a>> {
        // a store may hand out zeros for `None`, which no ciphertext is
        let data = data.filter(|data| data.iter().any(|&byte| byte != 0));
        let len = match data {
            Some(data) => {
                buffer[..PAGE_SIZE].copy_from_slice(data);
                PAGE_SIZE
            }
            None => 0,
        };
        let sealed = &mut buffer[..len + TAG_LEN];
        sealed[len..].copy_from_slice(&self.tag);
        let content = sealer
            .open_in_place(page, self.generation.into(), &self.nonce, sealed)
            .map_err(|cause| layout.refused(page, cause))?;
        Ok(content.first_chunk())
    }

    fn encode(self) -> [u8; SEAL_LEN] {
        let mut bytes = [0; SEAL_LEN];
        bytes[..NONCE_LEN].copy_from_slice(&self.nonce);
        bytes[NONCE_LEN..SEAL_OVERHEAD].copy_from_slice(&self.tag);
        bytes[SEAL_OVERHEAD..].copy_from_slice(&self.generation.to_le_bytes());
        bytes
    }

    /// `None` if none was ever set.
    fn decode(bytes: &[u8; SEAL_LEN]) -> Option<Self> {
        let (nonce, rest) = bytes.split_first_chunk()?;
        let (tag, generation) = rest.split_first_chunk()?;
        let generation = u32::from_le_bytes(generation.try_into().ok()?);
        (generation != 0).then_some(Self { nonce: *nonce, tag: *tag, generation })
    }
}

/// Which pages of the inner store are what.
struct Layout {
    /// One page at first, then the next level of seal pages each; the VM's pages in the end.
    levels: Vec<Range<u64>>,
}

impl Layout {
    fn new(vm_pages: u64) -> Self {
        let mut counts = vec![vm_pages];
        let mut count = vm_pages;
        while counts.len() == 1 || count > 1 {
            count = count.div_ceil(SEALS).max(1);
            counts.push(count);
        }
        let mut end = 0u64;
        let levels = counts.into_iter().rev().map(|count| {
            let start = end;
            end = end.saturating_add(count);
            start..end
        });
        Self { levels: levels.collect() }
    }

    fn vm(&self) -> Range<u64> {
        self.levels.last().cloned().unwrap_or_default()
    }

    fn seal_pages(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + use<> {
        let mut levels = self.levels.clone();
        levels.pop();
        levels.into_iter()
    }

    /// Returns the seal page that has the seal of this page, and its place there. `None` for the
    /// top one, and beyond the last page.
    fn seal_of(&self, page: u64) -> Option<(u64, usize)> {
        let [above, level] = self.pairs().rev().find(|[_, level]| level.contains(&page))?;
        let child = page - level.start;
        Some((above.start + child / SEALS, (child % SEALS) as usize))
    }

    /// Each level with the one above, which has its seals.
    fn pairs(&self) -> impl DoubleEndedIterator<Item = [&Range<u64>; 2]> {
        self.levels.windows(2).filter_map(|pair| match pair {
            [above, level] => Some([above, level]),
            _ => None,
        })
    }

    /// What a page is, for messages.
    fn name(&self, page: u64) -> String {
        match page.checked_sub(self.vm().start) {
            Some(page) => format!("page {page}"),
            None => format!("seal page {page}"),
        }
    }

    fn refused(&self, page: u64, cause: PageError) -> io::Error {
        let what = format!(
            "{}: it is not what was put there: it was changed, or is of another time or store",
            self.name(page)
        );
        io::Error::new(ErrorKind::InvalidData, Refused { what, cause })
    }
}

/// The seals of a checkpoint.
struct Tree {
    layout: Layout,
    /// Of the top seal page; `None` if no page was ever put.
    root: Option<Seal>,
    pages: SealPages,
}

impl Tree {
    /// Returns the first page at or behind `from` that has a seal, of those whose seal pages are
    /// known.
    fn first_sealed(&self, from: u64) -> Option<(u64, Seal)> {
        if let (TOP, Some(root)) = (from, self.root) {
            return Some((TOP, root));
        }
        self.layout.pairs().filter(|[_, level]| from < level.end).find_map(|[above, level]| {
            let child = from.saturating_sub(level.start);
            let first = above.start + child / SEALS;
            self.pages.range(first..above.end).find_map(|(&page, seals)| {
                let skip = if page == first { (child % SEALS) as usize } else { 0 };
                let start = level.start + (page - above.start) * SEALS;
                let places = seals.as_chunks().0.iter().zip(start..level.end).skip(skip);
                places.filter_map(|(place, at)| Some((at, Seal::decode(place)?))).next()
            })
        })
    }

    /// The seal of a page, if it has one.
    fn seal(&self, page: u64) -> Option<Seal> {
        let (above, slot) = self.layout.seal_of(page)?;
        Seal::decode(self.pages.get(&above)?.as_chunks().0.get(slot)?)
    }

    /// Returns the seal of a page that was handed out, which must be the first that has one from
    /// `next` on: that way none is left out, added or handed out twice.
    fn expect(&self, next: u64, page: u64) -> io::Result<Seal> {
        match self.first_sealed(next) {
            Some((found, seal)) if found == page => Ok(seal),
            Some((found, _)) if found < page => Err(self.missing(found)),
            _ => Err(invalid(format!("{}: it was never put, or is handed out twice", self.layout.name(page)))),
        }
    }

    /// Everything below `end` was handed out, if the next one would be `next`.
    fn nothing_missing(&self, next: u64, end: u64) -> io::Result<()> {
        match self.first_sealed(next) {
            Some((found, _)) if found < end => Err(self.missing(found)),
            _ => Ok(()),
        }
    }

    fn missing(&self, page: u64) -> io::Error {
        invalid(format!("{}: the store has left it out", self.layout.name(page)))
    }
}

/// What stands before the sealed state.
#[derive(Clone, Copy, Debug)]
struct Header {
    suite: Suite,
    vm: VmId,
    vm_pages: u64,
    /// Number of commits of this store.
    generation: u32,
}

impl Header {
    fn encode(self) -> [u8; HEADER_LEN] {
        let mut w = Writer::new();
        w.bytes(&MAGIC).u32(VERSION).u8(self.suite.code()).bytes(&self.vm.0).u64(self.vm_pages).u32(self.generation);
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(&w.into_bytes());
        bytes
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        if r.array("magic")? != MAGIC {
            return Err(DecodeError::invalid("magic", "not a sealed checkpoint"));
        }
        match r.u32("version")? {
            VERSION => {}
            other => return Err(DecodeError::invalid("version", format!("{other}, only {VERSION} is known"))),
        }
        let code = r.u8("cipher")?;
        let suite = Suite::from_code(code)
            .ok_or_else(|| DecodeError::invalid("cipher", format!("{code}, which is not known")))?;
        Ok(Self { suite, vm: VmId(r.array("VM")?), vm_pages: r.u64("pages")?, generation: r.u32("generation")? })
    }
}

/// Why what a store has handed out is refused.
#[derive(Debug, Error)]
#[error("{what}")]
struct Refused {
    what: String,
    #[source]
    cause: PageError,
}

fn sealer(header: &Header, master: &Psk, backend: &dyn Backend) -> io::Result<PageSealer> {
    PageSealer::new(master, header.vm, Purpose::Checkpoint, header.suite, backend).map_err(io::Error::other)
}

fn invalid(why: impl ToString) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why.to_string())
}
