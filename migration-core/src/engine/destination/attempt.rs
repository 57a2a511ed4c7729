//! The start of an attempt at the destination: the VM is built and its session is opened. This
//! module also handles a source that comes back to its session.

use std::hash::{BuildHasher, RandomState};

use super::{
    control_lane::Flow,
    fetchers::Gatherer,
    introduce::ControlLane,
    reserve::Reservation,
    session::{Agreed, Built},
    *,
};
use crate::wire::{FEATURE_PAYLOAD_CRC, FEATURE_STORES, FEATURES, HUGE_BLOCK, Hello, Welcome};
use crate::{
    page_map::PageMap,
    paged_memory::{PagedMemory, PagedMemoryParts},
    shared_map::SharedPageMap,
};

/// An accepted hello, and the action that follows from it.
pub(super) struct Greeted {
    pub(super) epoch: u32,
    /// The number of the control lane that speaks for the session from now on.
    pub(super) attachment: u64,
    pub(super) action: DestinationAction,
}

/// Refuses a source that comes back, with the reason. Returns the refusal as an error, or the
/// reason why it could not be sent.
pub(super) fn refuse_reattach(control: &mut ControlWriter, epoch: u32, why: &str) -> MigrationError {
    match control.send(epoch, &Control::error(ErrorCode::UnknownSession, why)) {
        Ok(()) => MigrationError::Peer { code: ErrorCode::UnknownSession, text: why.to_owned() },
        Err(error) => error,
    }
}

/// An attempt whose resources are reserved.
struct Begun {
    epoch: u32,
    attachment: u64,
    streams: u16,
    peer: String,
}

impl VmEntry {
    /// Serves a source that comes back to its session, until its control lane ends.
    pub(super) fn reattach(
        self: &Arc<Self>,
        session: &Arc<Session>,
        vm: VmId,
        epoch: u32,
        lane: ControlLane,
        peer: &str,
    ) -> Result<(), MigrationError> {
        let ControlLane { mut frames, mut control, closer, .. } = lane;
        let attachment = {
            let mut state = lock(&self.state);
            if !state.machine.may_reattach(vm, epoch) {
                drop(state);
                return Err(refuse_reattach(&mut control, epoch, "no VM of this epoch is held here"));
            }
            session.replace_control(control, closer);
            state.machine.handle(epoch, Control::Reattach(vm))?;
            state.attachment += 1;
            state.attachment
        };
        let served = self.frames(&mut frames, session, attachment);
        self.ended(session, attachment, peer, served);
        Ok(())
    }

    /// Serves a source that begins an attempt, until its control lane ends.
    pub(super) fn attempt(
        self: &Arc<Self>,
        greeted: Greeted,
        mut lane: ControlLane,
        peer: &str,
    ) -> Result<(), MigrationError> {
        let Greeted { epoch, attachment, action } = greeted;
        if let Err(error) = self.common.advance(lane.id, Stage::Identified, peer) {
            self.lost(attachment, &describe(&error));
            return Err(error);
        }
        self.report_phase();
        let DestinationAction::Build { hello, .. } = action else { return Ok(()) };
        let (streams, features) = (hello.streams.min(self.common.options.max_streams).max(1), hello.features);
        let reserved = match self.common.reserve(self.number, streams, features) {
            Ok(reserved) => reserved,
            Err(error) => {
                lane.control.send(epoch, &Control::error(error.code(), describe(&error)))?;
                self.lost(attachment, &describe(&error));
                return Err(error);
            }
        };
        let begun = Begun { epoch, attachment, streams: reserved.streams, peer: peer.to_owned() };
        let mut frames = lane.frames;
        let built = self.build(&begun, *hello, &mut frames, lane.control, lane.closer);
        let (session, features) = match built {
            Ok(built) => built,
            Err(error) => {
                self.lost(attachment, &describe(&error));
                return Err(error);
            }
        };
        if features & FEATURE_SHARED_RAM != 0 {
            // until now this thread has competed with the guest for the core
            self.common.options.spawner.assume(Role::HandOver, GuestImpact::Balanced);
        }
        let opened = self.open(&session, attachment, features);
        let first = opened.and_then(|()| self.first_frame(&mut frames, &session, attachment, reserved));
        let served = first.and_then(|flow| match flow {
            Flow::Continue => self.frames(&mut frames, &session, attachment),
            Flow::End => Ok(()),
        });
        if features & FEATURE_SHARED_RAM != 0 {
            // in any case the guest no longer waits for this thread
            self.common.options.spawner.end_switch_over();
            self.common.options.spawner.assume(Role::Control, GuestImpact::Balanced);
        }
        self.ended(&session, attachment, peer, served);
        Ok(())
    }

    /// Builds the VM and the session that receives it.
    fn build(
        &self,
        begun: &Begun,
        hello: Hello,
        frames: &mut ControlReader,
        mut control: ControlWriter,
        closer: Arc<dyn Closer>,
    ) -> Result<(Arc<Session>, u32), MigrationError> {
        let features = hello.features;
        let shared = features & FEATURE_SHARED_RAM != 0;
        let turn = self.turns.take();
        // the VM of an earlier epoch is void: it is freed before the new VM needs the memory
        let earlier = self.current(begun.attachment)?.session.take();
        self.free_vm(earlier, "a newer attempt of its source takes its place");
        self.join_watchers();
        let ram_bytes = hello.vm.layout.bytes();
        let built = if ram_bytes > self.common.options.max_ram_bytes {
            let limit = self.common.options.max_ram_bytes;
            Err(VmError::new(format!("the VM has {ram_bytes} bytes of RAM, this destination takes {limit}")))
        } else if shared {
            self.receive_ram(&hello, frames)
        } else {
            self.common.host.clone().build(&hello.vm, None)
        };
        let mut vm = match built.and_then(|vm| check_layout(vm, &hello)) {
            Ok(vm) => vm,
            Err(cause) => return Err(self.no_vm(begun, &mut control, ErrorCode::Mismatch, cause)),
        };
        let pager = if shared { None } else { vm.vm().pager() };
        let stores = !self.common.options.stores.is_empty();
        let mut features = if shared { FEATURE_SHARED_RAM } else { granted(features, pager.as_deref(), stores) };
        let protection = match self.protection(vm.vm(), &mut features) {
            Ok(protection) => protection.map(Arc::new),
            Err(cause) => return Err(self.no_vm(begun, &mut control, ErrorCode::State, cause)),
        };
        let pager = pager.filter(|_| features & FEATURE_POST_COPY != 0);
        let agreed = Agreed {
            token: new_token(hello.vm.id, begun.epoch),
            id: hello.vm.id,
            peer: begun.peer.clone(),
            epoch: begun.epoch,
            lanes: begun.streams,
            payload_crc: features & FEATURE_PAYLOAD_CRC != 0,
            shared,
            grace: self.common.options.progress_grace,
        };
        let stores = features & FEATURE_STORES != 0;
        let map = Arc::new(SharedPageMap::new(PageMap::new(vm.vm().ram().layout().pages())));
        let gatherer = pager.clone().filter(|_| stores).map(|pager| {
            let (map, stores) = (map.clone(), self.common.options.stores.clone());
            let memory = PagedMemory::new(PagedMemoryParts { vm: hello.vm.id, map, pager, stores });
            Arc::new(Gatherer::new(memory, self.common.options.owner))
        });
        let built = Built { vm, pager, protection, map, gatherer };
        let session = Arc::new(Session::new(agreed, built, control, closer));
        let mut state = self.current(begun.attachment)?;
        if stores {
            state.machine.allow_stores();
        }
        state.session = Some(session.clone());
        drop(state);
        drop(turn);
        Ok((session, features))
    }

    /// Refuses the source of an attempt for which no VM can be built. Its place is free before the
    /// refusal is sent, so that the next source is not refused as busy.
    fn no_vm(&self, begun: &Begun, control: &mut ControlWriter, code: ErrorCode, cause: VmError) -> MigrationError {
        let text = describe(&cause);
        self.lost(begun.attachment, &text);
        match control.send(begun.epoch, &Control::error(code, text)) {
            Ok(()) => MigrationError::Vm { step: "building the VM", cause },
            Err(error) => error,
        }
    }

    /// Builds a VM in the RAM that its source shares.
    fn receive_ram(&self, hello: &Hello, frames: &mut ControlReader) -> Result<Box<dyn AnyVm>, VmError> {
        if hello.features != FEATURE_SHARED_RAM {
            let why = format!("features {:#x}: shared RAM goes with no other", hello.features);
            return Err(VmError::new(why));
        }
        let files = frames.files(hello.vm.layout.regions().len());
        let files = files.map_err(|e| VmError::because("the memory files behind RAM", e))?;
        self.common.host.clone().build(&hello.vm, Some(files))
    }

    /// Prepares the VM for checkpoints if they are requested, or removes the feature.
    fn protection(&self, vm: &mut dyn DestinationVm, features: &mut u32) -> Result<Option<Protection>, VmError> {
        if *features & FEATURE_CHECKPOINTS == 0 {
            return Ok(None);
        }
        let Some(protected) = vm.protected() else {
            *features &= !FEATURE_CHECKPOINTS;
            return Ok(None);
        };
        Protection::new(protected, vm.identity(), vm.ram(), self.common.options.observer.clone()).map(Some)
    }

    /// Asks the source to open its lanes. A thread of the session waits for them, and sends
    /// *prepared*. Meanwhile the calling thread reads the control lane, and notices a source that
    /// gives up.
    fn open(self: &Arc<Self>, session: &Arc<Session>, attachment: u64, features: u32) -> Result<(), MigrationError> {
        let welcome = Welcome { version: VERSION, features, streams: session.lanes, session: session.token };
        session.send_control(&Control::Welcome(welcome))?;
        let (entry, session) = (self.clone(), session.clone());
        let body = move || match entry.await_lanes(&session, attachment) {
            Ok(()) => session.keep_alive(),
            // the thread that reads the control lane finds it closed, and ends the attempt
            Err(error) => session.fail(error.code(), &describe(&error)),
        };
        self.watcher(Role::Control, "mig-alive", Box::new(body))
    }

    /// Reads and handles the first frame after *welcome*. It is handled when all lanes are open and
    /// their reservation is not needed any more. The frame of a source that gives up is handled at
    /// once.
    fn first_frame(
        self: &Arc<Self>,
        frames: &mut ControlReader,
        session: &Arc<Session>,
        attachment: u64,
        reserved: Reservation<'_>,
    ) -> Result<Flow, MigrationError> {
        // lanes have their own time-out, and the source sends its frame only after the lanes are
        // open
        let patience = self.common.options.idle_timeout.saturating_mul(2);
        frames.set_idle_timeout(patience)?;
        let (epoch, frame) = frames.read()?;
        if !matches!(frame, Control::Abandon | Control::Error { .. }) {
            session.wait_prepared(patience)?;
        }
        drop(reserved);
        frames.set_idle_timeout(self.common.options.idle_timeout)?;
        self.frame(session, attachment, epoch, frame)
    }

    /// Waits until all lanes are open, and sends *prepared*.
    fn await_lanes(&self, session: &Session, attachment: u64) -> Result<(), MigrationError> {
        session.wait_attached(self.common.options.idle_timeout)?;
        let load = session.vm.borrow().and_then(|mut vm| vm.vm().estimate_load());
        let prepared = self.current(attachment)?.machine.prepared(load)?;
        session.report_prepared(&prepared)?;
        self.report_phase();
        Ok(())
    }
}

/// Returns the requested feature bits that a VM with this pager supports.
fn granted(wanted: u32, pager: Option<&dyn Pager>, has_stores: bool) -> u32 {
    let both = FEATURE_POST_COPY | FEATURE_HUGE_BLOCKS;
    let post_copy = match pager.map(|pager| pager.block_pages()) {
        Some(1) => wanted & FEATURE_POST_COPY,
        // a source that sends single missing pages cannot serve a pager that needs huge blocks
        Some(HUGE_BLOCK) if wanted & both == both => both,
        _ => 0,
    };
    let checkpoints = if post_copy == 0 { 0 } else { wanted & FEATURE_CHECKPOINTS };
    // fetching from stores needs blocks of one page, and no checkpoints: a page that a checkpoint
    // may need must not be released
    let fetches = has_stores && post_copy == FEATURE_POST_COPY && checkpoints == 0;
    let stores = if fetches { wanted & FEATURE_STORES } else { 0 };
    let without = both | FEATURE_CHECKPOINTS | FEATURE_STORES;
    wanted & FEATURES & !without | post_copy | checkpoints | stores
}

/// Checks that the VM was built with the layout of the hello, because received pages are checked
/// against the layout of the VM.
fn check_layout(mut vm: Box<dyn AnyVm>, hello: &Hello) -> Result<Box<dyn AnyVm>, VmError> {
    if *vm.vm().ram().layout() == hello.vm.layout {
        Ok(vm)
    } else {
        Err(VmError::new("the VM was built with another RAM layout than the source's"))
    }
}

/// Returns a token that cannot be guessed: SipHash with keys that the standard library gets from
/// the operating system.
fn new_token(vm: VmId, epoch: u32) -> SessionToken {
    let mut token = [0; 16];
    for half in token.chunks_mut(8) {
        // every `RandomState` has its own keys
        half.copy_from_slice(&RandomState::new().hash_one((vm, epoch)).to_le_bytes());
    }
    SessionToken(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::destination::missing::tests::missing;

    /// Tests every combination of requested features, with pagers of every kind.
    #[test]
    fn what_is_granted_fits_the_pager() {
        let pages = FEATURE_POST_COPY | FEATURE_HUGE_BLOCKS;
        for block_pages in [0, 1, HUGE_BLOCK, 2 * HUGE_BLOCK] {
            let pager = (block_pages > 0).then(|| missing(block_pages, &[]).1);
            for wanted in 0..=u32::from(u8::MAX) {
                let granted = |stores| granted(wanted, pager.as_deref().map(|pager| pager as &dyn Pager), stores);
                let fetches = block_pages == 1 && wanted & FEATURE_POST_COPY != 0 && wanted & FEATURE_CHECKPOINTS == 0;
                let stores = if fetches { wanted & FEATURE_STORES } else { 0 };
                assert_eq!(granted(true) ^ granted(false), stores, "{block_pages} {wanted:#b}");
                let granted = granted(false);
                assert_eq!(granted & !(wanted & FEATURES), 0, "{block_pages} {wanted:#b}: nobody wants that");
                let serves = match block_pages {
                    1 => wanted & FEATURE_POST_COPY,
                    HUGE_BLOCK if wanted & pages == pages => pages,
                    _ => 0,
                };
                assert_eq!(granted & pages, serves, "{block_pages} {wanted:#b}");
                let checkpoints = if serves == 0 { 0 } else { wanted & FEATURE_CHECKPOINTS };
                assert_eq!(granted & FEATURE_CHECKPOINTS, checkpoints, "{block_pages} {wanted:#b}");
                let others = FEATURES & !pages & !FEATURE_CHECKPOINTS & !FEATURE_STORES;
                assert_eq!(granted & FEATURE_STORES, 0, "{block_pages} {wanted:#b}");
                assert_eq!(granted & others, wanted & others, "{block_pages} {wanted:#b}");
            }
        }
    }

    #[test]
    fn no_two_tokens_are_alike() {
        let tokens: std::collections::HashSet<u64> = (0..100)
            .flat_map(|_| new_token(VmId([1; 16]), 1).0.as_chunks().0.to_vec())
            .map(u64::from_le_bytes)
            .collect();
        assert_eq!(tokens.len(), 200, "each half is drawn anew");
    }
}
