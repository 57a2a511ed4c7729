//! A destination under test.

use std::{
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    channel::Listener,
    engine::{ReceiveError, Receiver, ReceiverHandle, ReceiverOptions},
    report::{Event, Observer},
    vm::DestinationHost,
    wire::{Control, Header},
};

use crate::{
    HANG,
    channels::{Door, End, pair},
    guest::{Arrived, Host, description},
};
pub(crate) struct Log(pub(crate) Mutex<mpsc::Sender<String>>);

impl Observer for Log {
    fn event(&self, event: &Event) {
        let text = match event {
            Event::BadPeer { why, .. } | Event::Discarded(why) | Event::Warning(why) => why,
            _ => return,
        };
        let _ = self.0.lock().unwrap().send(text.clone());
    }
}

pub(crate) struct Destination {
    pub(crate) door: mpsc::Sender<Option<End>>,
    pub(crate) handle: ReceiverHandle,
    pub(crate) thread: Option<thread::JoinHandle<Result<(), ReceiveError>>>,
    pub(crate) arrived: mpsc::Receiver<Arrived>,
    pub(crate) log: mpsc::Receiver<String>,
}

impl Destination {
    pub(crate) fn new() -> Self {
        Self::patient(HANG)
    }

    pub(crate) fn patient(idle_timeout: Duration) -> Self {
        Self::of(idle_timeout, |to| Host { description: description(), to, paging: None })
    }

    pub(crate) fn of(idle_timeout: Duration, host: impl FnOnce(mpsc::Sender<Arrived>) -> Host) -> Self {
        Self::with(ReceiverOptions { idle_timeout, ..ReceiverOptions::default() }, host)
    }

    pub(crate) fn with<H>(options: ReceiverOptions, host: impl FnOnce(mpsc::Sender<Arrived>) -> H) -> Self
    where
        H: DestinationHost<Vm: Send + 'static> + Send + Sync + 'static,
    {
        let (log_tx, log) = mpsc::channel();
        let (arrived_tx, arrived) = mpsc::channel();
        let options = ReceiverOptions { observer: Arc::new(Log(Mutex::new(log_tx))), ..options };
        Self::receiving((host(arrived_tx), arrived), options, log)
    }

    /// A receiver with this observer, which may write to the other end of `log`.
    pub(crate) fn observed(
        idle_timeout: Duration,
        host: (impl DestinationHost<Vm: Send + 'static> + Send + Sync + 'static, mpsc::Receiver<Arrived>),
        observer: Arc<dyn Observer>,
        log: mpsc::Receiver<String>,
    ) -> Self {
        Self::receiving(host, ReceiverOptions { observer, idle_timeout, ..ReceiverOptions::default() }, log)
    }

    fn receiving(
        (host, arrived): (impl DestinationHost<Vm: Send + 'static> + Send + Sync + 'static, mpsc::Receiver<Arrived>),
        options: ReceiverOptions,
        log: mpsc::Receiver<String>,
    ) -> Self {
        let (door, ends) = mpsc::channel();
        Self::listening((Door(ends), door), (host, arrived), options, log)
    }

    /// A receiver at this listener, which gets the ends that are sent to `door`.
    pub(crate) fn behind(
        listener: impl Listener + 'static,
        door: mpsc::Sender<Option<End>>,
        host: impl FnOnce(mpsc::Sender<Arrived>) -> Host,
    ) -> Self {
        let (log_tx, log) = mpsc::channel();
        let (arrived_tx, arrived) = mpsc::channel();
        let observer = Arc::new(Log(Mutex::new(log_tx)));
        let options = ReceiverOptions { observer, idle_timeout: HANG, ..ReceiverOptions::default() };
        Self::listening((listener, door), (host(arrived_tx), arrived), options, log)
    }

    fn listening(
        (mut listener, door): (impl Listener + 'static, mpsc::Sender<Option<End>>),
        (host, arrived): (impl DestinationHost<Vm: Send + 'static> + Send + Sync + 'static, mpsc::Receiver<Arrived>),
        options: ReceiverOptions,
        log: mpsc::Receiver<String>,
    ) -> Self {
        let receiver = Receiver::new(host, drop, options);
        let handle = receiver.handle();
        let thread = thread::spawn(move || receiver.run(&mut listener));
        Self { door, handle, thread: Some(thread), arrived, log }
    }

    pub(crate) fn connect(&self, bytes: &[u8]) -> End {
        let (here, there) = pair();
        here.outgoing.write(bytes).unwrap();
        self.door.send(Some(there)).unwrap();
        here
    }

    /// Waits until the receiver has ended with a VM; also returns all that it told its observer, in
    /// lines.
    pub(crate) fn finish(self) -> (Arrived, String) {
        self.ended(|arrived| arrived.recv_timeout(HANG).expect("a VM has arrived"))
    }

    /// As [`finish`](Self::finish), for a VM that the test has got already.
    pub(crate) fn finish_after(self, arrived: Arrived) -> (Arrived, String) {
        self.ended(|_| arrived)
    }

    fn ended(mut self, arrived: impl FnOnce(&mpsc::Receiver<Arrived>) -> Arrived) -> (Arrived, String) {
        // it may have seen the end by itself already
        let _ = self.door.send(None);
        let thread = self.thread.take().unwrap();
        let deadline = Instant::now() + HANG;
        while !thread.is_finished() {
            // said here, rather than by whoever stops a test that hangs
            let told = || self.log.try_iter().collect::<Vec<_>>().join("\n");
            assert!(Instant::now() < deadline, "the receiver listens on, in {:?}: {}", self.handle.phase(), told());
            thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap().unwrap();
        let arrived = arrived(&self.arrived);
        // its threads have ended: nothing more will come
        (arrived, self.log.try_iter().collect::<Vec<_>>().join("\n"))
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.handle.stop();
            let _ = self.door.send(None);
            // a test that has failed may have found a receiver that hangs
            if !thread::panicking() {
                thread.join().unwrap().expect_err("stopped without a VM");
            }
        }
    }
}

/// The next frame that the receiver says on a control lane; `None` at its end.
pub(crate) fn said(control: &End) -> Option<Control> {
    let bytes = |len: usize| {
        let mut bytes = vec![0; len];
        drop(
            control.incoming.wait("a word of the receiver", |s| s.closed || s.ended || s.deaf || s.bytes.len() >= len),
        );
        // what was said before the lane was closed still counts
        let mut state = control.incoming.lock();
        (state.bytes.len() >= len).then(|| {
            state.bytes.drain(..len).zip(&mut bytes).for_each(|(from, to)| *to = from);
            bytes
        })
    };
    let header = Header::decode(bytes(Header::LEN)?.first_chunk().unwrap()).unwrap();
    let body = bytes(header.body as usize)?;
    Some(Control::decode(&header, &body).unwrap())
}
