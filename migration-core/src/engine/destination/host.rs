//! Calls of the VMM at a destination, through traits that hide the VMM's types.
//!
//! Neither this module nor its callers hold a lock while the VMM is called, because the VMM may
//! call back.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex},
};

use crate::{
    lock::lock,
    vm::{Arrived, DestinationHost, DestinationVm, FailedAttempt, VmDescription, VmError, VmId},
};

/// A [`DestinationHost`] of any type, together with the callback that receives its VMs.
pub(super) trait AnyHost: Send + Sync {
    /// Builds a VM. If its RAM is shared, `files` contains the memory files of the RAM.
    fn build(self: Arc<Self>, vm: &VmDescription, files: Option<Vec<OwnedFd>>) -> Result<Box<dyn AnyVm>, VmError>;

    /// Calls the method of the host that belongs to this notice.
    fn notify(&self, vm: VmId, notice: Notice);

    /// Calls [`DestinationHost::attempt_failed`].
    fn attempt_failed(&self, failed: &FailedAttempt);
}

/// A VM that an [`AnyHost`] has built.
pub(super) trait AnyVm: Send {
    /// Returns the VM.
    fn vm(&mut self) -> &mut dyn DestinationVm;

    /// Passes the VM to the callback that receives the VMs of the host.
    fn arrived(self: Box<Self>, id: VmId, epoch: u32, not_started: Option<VmError>);
}

/// A notice to the host about a VM that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// The link is lost while pages are missing.
    LinkLost,
    /// The link is restored, or is not needed any more.
    LinkFound,
}

/// Hides the types of a host and of the callback that receives its VMs.
pub(super) fn any_host<H, A>(host: H, arrived: A) -> Arc<dyn AnyHost>
where
    H: DestinationHost<Vm: Send + 'static> + Send + Sync + 'static,
    A: Fn(Arrived<H::Vm>) + Send + Sync + 'static,
{
    Arc::new(Typed { host, arrived })
}

struct Typed<H, A> {
    host: H,
    arrived: A,
}

struct TypedVm<H: DestinationHost, A> {
    vm: H::Vm,
    host: Arc<Typed<H, A>>,
}

impl<H, A> AnyHost for Typed<H, A>
where
    H: DestinationHost<Vm: Send + 'static> + Send + Sync + 'static,
    A: Fn(Arrived<H::Vm>) + Send + Sync + 'static,
{
    fn build(self: Arc<Self>, vm: &VmDescription, files: Option<Vec<OwnedFd>>) -> Result<Box<dyn AnyVm>, VmError> {
        let vm = match files {
            None => self.host.build(vm),
            Some(files) => self.host.build_shared(vm, files),
        };
        Ok(Box::new(TypedVm { vm: vm?, host: self }))
    }

    fn notify(&self, vm: VmId, notice: Notice) {
        match notice {
            Notice::LinkLost => self.host.link_lost(vm),
            Notice::LinkFound => self.host.link_found(vm),
        }
    }

    fn attempt_failed(&self, failed: &FailedAttempt) {
        self.host.attempt_failed(failed);
    }
}

impl<H, A> AnyVm for TypedVm<H, A>
where
    H: DestinationHost<Vm: Send + 'static> + Send + Sync + 'static,
    A: Fn(Arrived<H::Vm>) + Send + Sync + 'static,
{
    fn vm(&mut self) -> &mut dyn DestinationVm {
        &mut self.vm
    }

    fn arrived(self: Box<Self>, id: VmId, epoch: u32, not_started: Option<VmError>) {
        let Self { vm, host } = *self;
        (host.arrived)(Arrived { vm, id, epoch, not_started });
    }
}

/// Delivers notices about a VM to its host, in order, one at a time, and only after the VM has
/// arrived. If a thread adds a notice while another one delivers, the other thread delivers it.
#[derive(Default)]
pub(super) struct Notices {
    state: Mutex<NoticeState>,
    changed: Condvar,
}

#[derive(Default)]
struct NoticeState {
    /// Whether the VM has arrived.
    open: bool,
    /// Whether a thread is delivering a notice.
    delivering: bool,
    waiting: VecDeque<Notice>,
}

impl Notices {
    /// Records that the VM has arrived, and delivers the notices that waited for that.
    pub(super) fn open(&self, deliver: impl Fn(Notice)) {
        lock(&self.state).open = true;
        self.changed.notify_all();
        self.deliver(deliver);
    }

    /// Adds a notice, and delivers it at once if the VM has arrived and no other thread is
    /// delivering one.
    pub(super) fn add(&self, notice: Notice, deliver: impl Fn(Notice)) {
        lock(&self.state).waiting.push_back(notice);
        self.deliver(deliver);
    }

    /// Waits until the VM has arrived.
    pub(super) fn wait_open(&self) {
        let closed = |state: &mut NoticeState| !state.open;
        drop(self.changed.wait_while(lock(&self.state), closed).unwrap_or_else(|e| e.into_inner()));
    }

    fn deliver(&self, deliver: impl Fn(Notice)) {
        loop {
            let mut state = lock(&self.state);
            if !state.open || state.delivering {
                return;
            }
            let Some(notice) = state.waiting.pop_front() else { return };
            state.delivering = true;
            drop(state);
            let _delivering = Delivering(&self.state);
            deliver(notice);
        }
    }
}

/// The delivery of one notice. It ends when this is dropped, also if the host panics.
struct Delivering<'a>(&'a Mutex<NoticeState>);

impl Drop for Delivering<'_> {
    fn drop(&mut self) {
        lock(self.0).delivering = false;
    }
}

/// Lets one attempt at a time build a VM. The VM of an attempt that was given up is dropped before
/// the next attempt needs the memory.
#[derive(Default)]
pub(super) struct Turns {
    taken: Mutex<bool>,
    free: Condvar,
}

/// The turn of one attempt, which ends when this is dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for a turn.
    pub(super) fn take(&self) -> Turn<'_> {
        let waited = self.free.wait_while(lock(&self.taken), |taken| *taken);
        *waited.unwrap_or_else(|e| e.into_inner()) = true;
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.taken) = false;
        self.0.free.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A notice that the host adds while it handles another one is delivered after that one, and
    /// the host does not wait for it.
    #[test]
    fn notices_come_in_order_once_the_vm_has_arrived() {
        let (notices, told) = (Notices::default(), Mutex::new(Vec::new()));
        let tell = |notice| lock(&told).push(notice);
        notices.add(Notice::LinkLost, tell);
        assert!(lock(&told).is_empty(), "it has not arrived");
        notices.open(|notice| {
            if notice == Notice::LinkLost {
                notices.add(Notice::LinkFound, |_| unreachable!("another one delivers"));
            }
            tell(notice);
        });
        notices.add(Notice::LinkLost, tell);
        assert_eq!(*lock(&told), [Notice::LinkLost, Notice::LinkFound, Notice::LinkLost]);
    }
}
