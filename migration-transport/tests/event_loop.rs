//! A VM arrives in an event loop that polls a descriptor.

#[allow(dead_code, reason = "these tests need a part of it")]
mod common;

use std::{os::fd::AsFd, thread};

use common::{TestHost, TestVm};
use migration_core::{
    engine::{Controller, ReceiverEvent, ReceiverOptions, ReceiverQueue, SourceOptions, migrate},
    report::Outcome,
    strategy::PreCopy,
};
use migration_transport::{Address, ConnectOptions, Wakeup, bind, connector};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A test that waits longer than this, in milliseconds, has found a hang.
const HANG: u16 = 20_000;

#[test]
fn a_vm_arrives_in_a_loop_that_polls_a_descriptor() {
    let listener = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address: Address = listener.address().parse().unwrap();
    let (wakeup, (host, _arrived)) = (Wakeup::new().unwrap(), TestHost::new(0));
    let mut queue = ReceiverQueue::new(host, listener, ReceiverOptions::default(), wakeup.waker()).unwrap();
    let source = thread::spawn(move || {
        let link = connector(&address, ConnectOptions::default());
        let options = SourceOptions::default();
        migrate(&mut TestVm::new(), &*link, &mut <PreCopy>::default(), &options, Controller::new().1)
    });
    let mut guest = None;
    let ended = 'events: loop {
        let mut polled = [PollFd::new(wakeup.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut polled, PollTimeout::from(HANG)), Ok(1), "the loop is not woken");
        wakeup.clear();
        while let Some(event) = queue.next() {
            match event {
                ReceiverEvent::Arrived(arrived) => guest = Some(arrived.vm.guest),
                ReceiverEvent::Ended(ended) => break 'events ended,
                event => panic!("{}", matches!(event, ReceiverEvent::AttemptFailed(_))),
            }
        }
    };
    ended.unwrap();
    assert_eq!(source.join().unwrap().outcome, Outcome::Completed);
    let guest = guest.expect("a VM has arrived before the receiver ended");
    assert!(guest.is_running());
    guest.set_running(false);
}
