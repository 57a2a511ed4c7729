//! A guest that comes to a VMM which keeps its VM, at the moment when nobody waits for it any more.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, OnceLock, mpsc},
    thread,
};

use migration_core::{
    GuestRam,
    engine::{
        ReceiverHandle, ReceiverOptions,
        ephemeral::{PersistentVm, Standby},
    },
    state::VmState,
    vm::{DestinationHost, DestinationVm, SourceVm, VmDescription, VmError, VmId},
    wire::{Control, FEATURE_SHARED_RAM, LaneKind, Preamble, SessionToken},
};

use crate::{
    HANG, VM,
    bounds::hello_of,
    channels::{Door, pair},
    destination::said,
    guest::{ArrivingVm, Host, description, state},
    sessions::{lane, token_of},
};

/// The VM in a VMM that ends the wait for its guest as soon as that runs.
struct Seat {
    host: Host,
    handle: Arc<OnceLock<ReceiverHandle>>,
}

impl PersistentVm for Seat {
    type Coming = Coming;

    fn id(&self) -> VmId {
        VM
    }

    fn leaving(&mut self) -> Box<dyn SourceVm> {
        unreachable!("the guest stays")
    }

    fn coming(&mut self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Coming, VmError> {
        assert_eq!(files.len(), vm.layout.regions().len());
        Ok(Coming { vm: self.host.build(vm)?, handle: self.handle.clone() })
    }
}

struct Coming {
    vm: ArrivingVm,
    handle: Arc<OnceLock<ReceiverHandle>>,
}

impl DestinationVm for Coming {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.vm.ram()
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        self.vm.load_state(state)
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        self.vm.start(running)?;
        self.handle.get().unwrap().stop();
        Ok(())
    }
}

#[test]
fn a_guest_that_has_come_is_here_although_the_wait_for_it_was_ended() {
    let ((door, ends), (to, arrived)) = (mpsc::channel(), mpsc::channel());
    let handle = Arc::new(OnceLock::new());
    let host = Host { description: description(), to, paging: None };
    let options = ReceiverOptions { idle_timeout: HANG, ..ReceiverOptions::default() };
    let awaiting = Standby::new(Seat { host, handle: handle.clone() }).await_guest(options);
    assert!(handle.set(awaiting.handle()).is_ok());
    let waits = thread::spawn(move || match awaiting.wait_for_guest(&mut Door(ends)) {
        Ok(active) => Ok(active.epoch()),
        Err((_standby, why)) => Err(why),
    });
    let connect = |bytes: &[u8]| {
        let (here, there) = pair();
        here.outgoing.write(bytes).unwrap();
        door.send(Some(there)).unwrap();
        here
    };
    let hello = hello_of(VM, FEATURE_SHARED_RAM, 1);
    let control = connect(&lane(LaneKind::Control, 0, SessionToken::default(), 1, &[hello]));
    let _bulk = connect(&Preamble::new(LaneKind::Bulk, 0, token_of(&control)).encode());
    let state = state().encode();
    let offer = Control::Offer { generation: 0, state_bytes: state.len() as u64, running: true };
    for (sequence, frame) in [Control::State(state.into()), offer, Control::Run].iter().enumerate() {
        let name = ["prepared", "", "ready"][sequence];
        while !name.is_empty() && said(&control).expect("the lane goes on").name() != name {}
        control.outgoing.write(&frame.encode(0, 1 + sequence as u32, 1)).unwrap();
    }
    let ended = waits.join().unwrap();
    assert!(matches!(ended, Ok(1)), "{ended:?}");
    assert!(arrived.recv_timeout(HANG).unwrap().running);
}
