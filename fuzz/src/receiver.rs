//! The whole receiver, with arbitrary bytes on its lanes.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc},
    time::Duration,
};

use migration_core::{
    GuestRam, HeapRam, RamSlice,
    channel::{Channel, Closer, Halves, Listener, ReadHalf, WriteHalf},
    engine::{Receiver, ReceiverOptions},
    pager::Pager,
    state::{Section, VmState},
    vm::{DestinationHost, DestinationVm, VmDescription, VmError},
    wire::{Bulk, Control, Header, Preamble, SessionToken},
};

use crate::{pager::PlainPager, repair};

/// Most RAM of a VM.
const MAX_RAM: u64 = 4 << 20;
/// How long the receiver waits for lanes and lanes for each other; nothing waits so long unless the
/// input says so.
const PATIENCE: Duration = Duration::from_millis(3);

/// Bit of the first byte: checksums and sequence numbers of all lanes are repaired.
pub const REPAIR: u8 = 1;
/// Bit of the first byte: bulk lanes get the session's token, whatever their input says.
pub const TOKEN: u8 = 2;

/// Bit of the first byte: missing pages can be served.
pub const PAGER: u8 = 4;
/// Bit of the first byte: they come in blocks of 2 MiB.
pub const BLOCKS: u8 = 8;
/// Bit of the first byte: loading the state needs a page that is missing.
pub const TOUCH: u8 = 16;
/// Bit of the first byte: there is no round before the hand-over, so pages of generation 1 come
/// behind it.
pub const NO_ROUND: u8 = 32;

/// The first link has a control lane and two others, and so has the one that takes its place.
const LANES: usize = 6;
const SECOND_LINK: usize = 3;

/// An input: flags, then for each of the lanes (control and two others, then the same after a loss
/// of the link) its length as `u16` and its bytes. What is left over is nobody's.
///
/// How often the receiver has said *running*, and whether it has said *complete*.
pub fn check(input: &[u8]) -> (u32, bool) {
    let Some((&flags, mut rest)) = input.split_first() else { return (0, false) };
    let mut scripts = Vec::new();
    for _ in 0..LANES {
        let len = rest.first_chunk().map_or(0, |&len| usize::from(u16::from_le_bytes(len)));
        let bytes = rest.get(2..).unwrap_or_default();
        let (script, behind) = bytes.split_at(len.min(bytes.len()));
        let mut script = script.to_vec();
        if flags & REPAIR != 0 {
            repair::preamble(&mut script);
            repair::stream(script.get_mut(Preamble::LEN..).unwrap_or_default());
        }
        scripts.push(script);
        rest = behind;
    }
    let world = World::new(scripts.len(), flags);
    let (lanes, mut listener) = ScriptListener::new();
    for (index, bytes) in scripts.into_iter().enumerate() {
        if bytes.is_empty() {
            // a lane that is never opened
            world.update(|lanes| lanes.ended[index] = true);
        } else {
            // the listener is there until the receiver ends, so nothing is lost
            drop(lanes.send(Script { index, bytes, world: world.clone() }));
        }
    }
    let options = ReceiverOptions {
        max_streams: 3,
        max_ram_bytes: MAX_RAM,
        idle_timeout: PATIENCE,
        ..ReceiverOptions::default()
    };
    let receiver = Receiver::new(Host { flags }, drop, options);
    let handle = receiver.handle();
    listener.ended = Some(Box::new(move || handle.stop()));
    listener.world = Some(world.clone());
    drop(lanes);
    // it ends either because it has a VM or because it was stopped; a VM that it holds dies with it
    drop(receiver.run(&mut listener));
    let lanes = world.lock();
    (lanes.running, lanes.complete)
}

/// What the lanes of one input know of each other.
struct World {
    flags: u8,
    state: Mutex<Lanes>,
    changed: Condvar,
}

struct Lanes {
    /// The token of the session, once the receiver has said it.
    token: Option<SessionToken>,
    /// Whether missing pages are awaited: the receiver has asked for one, or runs the VM; how often
    /// it has said so.
    awaited: bool,
    running: u32,
    /// Whether it has said that it has all pages.
    complete: bool,
    /// Lanes whose input was read to its end, and lanes that are gone.
    drained: Vec<bool>,
    ended: Vec<bool>,
}

impl Lanes {
    /// Whether nothing more comes on this lane.
    fn over(&self, index: usize) -> bool {
        self.drained[index] || self.ended[index]
    }
}

impl World {
    fn new(lanes: usize, flags: u8) -> Arc<Self> {
        let state = Lanes {
            token: None,
            awaited: false,
            running: 0,
            complete: false,
            drained: vec![false; lanes],
            ended: vec![false; lanes],
        };
        Arc::new(Self { flags, state: Mutex::new(state), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.state.lock().expect("a panic aborts")
    }

    fn update(&self, change: impl FnOnce(&mut Lanes)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `done`, but not for ever: an input may never bring it about.
    fn wait(&self, done: impl Fn(&Lanes) -> bool) -> MutexGuard<'_, Lanes> {
        let waited = self.changed.wait_timeout_while(self.lock(), PATIENCE, |lanes| !done(lanes));
        waited.expect("a panic aborts").0
    }
}

/// A lane: its input, then silence until no other lane has anything left to say, then its end.
struct Script {
    index: usize,
    bytes: Vec<u8>,
    world: Arc<World>,
}

struct ScriptListener {
    lanes: mpsc::Receiver<Script>,
    ended: Option<Box<dyn FnOnce() + Send>>,
    world: Option<Arc<World>>,
}

impl ScriptListener {
    fn new() -> (mpsc::Sender<Script>, Self) {
        let (tx, lanes) = mpsc::channel();
        (tx, Self { lanes, ended: None, world: None })
    }
}

impl Listener for ScriptListener {
    fn accept(&mut self, _timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        match self.lanes.try_recv() {
            Ok(lane) => {
                if lane.index > 0 && lane.world.flags & TOKEN != 0 {
                    // what introduces itself with the token comes after the session's begin
                    drop(lane.world.wait(|lanes| lanes.token.is_some() || lanes.over(0)));
                }
                if lane.index >= SECOND_LINK {
                    // the source comes back when it has said everything, and opens the other lanes
                    // when it was answered
                    let index = lane.index;
                    drop(lane.world.wait(|lanes| {
                        if index == SECOND_LINK { lanes.over(0) } else { lanes.running > 1 || lanes.over(SECOND_LINK) }
                    }));
                }
                Ok(Some(Box::new(lane)))
            }
            Err(_) => {
                // all are accepted: as soon as all are over, so is the receiver
                if let Some(world) = &self.world {
                    drop(world.wait(|lanes| lanes.ended.iter().all(|ended| *ended)));
                    if !world.lock().ended.iter().all(|ended| *ended) {
                        return Ok(None);
                    }
                }
                if let Some(stop) = self.ended.take() {
                    stop();
                }
                Ok(None)
            }
        }
    }

    fn address(&self) -> String {
        "fuzz".into()
    }
}

impl Channel for Script {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let Script { index, mut bytes, world } = *self;
        if index > 0
            && world.flags & TOKEN != 0
            && let (Some(token), Some(place)) = (world.lock().token, bytes.get_mut(16..32))
        {
            place.copy_from_slice(&token.0);
            repair::preamble(&mut bytes);
        }
        let writer = Writer { index, world: world.clone() };
        let closer = Ender { index, world: world.clone() };
        let reader = Reader { index, bytes, at: 0, world };
        Ok(Halves { reader: Box::new(reader), writer: Box::new(writer), closer: Box::new(closer) })
    }

    fn peer(&self) -> String {
        format!("lane {}", self.index)
    }
}

/// The kind of the source's last frame.
const DONE: u8 = 0x0b;

struct Reader {
    index: usize,
    bytes: Vec<u8>,
    at: usize,
    world: Arc<World>,
}

impl Reader {
    /// Pages that were left behind come when they are awaited, and the source's last word when all
    /// have come.
    fn await_turn(&self) {
        let Some(header) = self.bytes[self.at..].first_chunk().and_then(|bytes| Header::decode(bytes).ok()) else {
            return;
        };
        let (index, first) = (self.index, if self.world.flags & NO_ROUND != 0 { 1 } else { 2 });
        if index % SECOND_LINK != 0 {
            if header.number >= first {
                drop(self.world.wait(|lanes| lanes.awaited || lanes.ended[index] || lanes.over(0)));
            }
        } else if header.kind == DONE {
            drop(self.world.wait(|lanes| lanes.complete || lanes.ended[index]));
        }
    }

    fn take(&mut self, len: usize) -> io::Result<&[u8]> {
        if self.bytes.len() - self.at < len {
            let index = self.index;
            self.world.update(|lanes| lanes.drained[index] = true);
            // silent while others speak: a lane that ends too early would end the session
            drop(self.world.wait(|lanes| {
                lanes.ended[index] || lanes.drained.iter().zip(&lanes.ended).all(|(drained, ended)| *drained || *ended)
            }));
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if len == Header::LEN && self.world.flags & PAGER != 0 {
            self.await_turn();
        }
        if self.world.lock().ended[self.index] {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        self.at += len;
        Ok(&self.bytes[self.at - len..self.at])
    }
}

impl ReadHalf for Reader {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(self.take(buf.len())?);
        Ok(())
    }

    fn read_ram(&mut self, slices: &[RamSlice<'_>]) -> io::Result<()> {
        for slice in slices {
            slice.copy_from(self.take(slice.len())?);
        }
        Ok(())
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let index = self.index;
        self.world.update(|lanes| lanes.ended[index] = true);
    }
}

/// The kind of a request for missing pages.
const REQUEST: u8 = 0x42;

/// Checks what the receiver says, and takes the session's token from it.
struct Writer {
    index: usize,
    world: Arc<World>,
}

impl WriteHalf for Writer {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let (header, body) = head.split_first_chunk::<{ Header::LEN }>().expect("a whole frame");
        let header = Header::decode(header).expect("the receiver's own header");
        assert!(slices.is_empty(), "a receiver sends no pages");
        if header.kind == REQUEST {
            let request = Bulk::decode(&header, body, MAX_RAM).expect("the receiver's own request");
            assert!(matches!(request, Bulk::Request { .. }) && self.world.flags & PAGER != 0);
            self.world.update(|lanes| lanes.awaited = true);
        } else {
            match Control::decode(&header, body).expect("the receiver's own frame") {
                Control::Welcome(welcome) => self.world.update(|lanes| lanes.token = Some(welcome.session)),
                Control::Running => {
                    self.world.update(|lanes| (lanes.awaited, lanes.running) = (true, lanes.running + 1))
                }
                Control::Complete(_) => self.world.update(|lanes| lanes.complete = true),
                _ => {}
            }
        }
        if self.world.lock().ended[self.index] { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    fn set_idle_timeout(&mut self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

struct Ender {
    index: usize,
    world: Arc<World>,
}

impl Closer for Ender {
    fn close(&self) {
        self.world.update(|lanes| lanes.ended[self.index] = true);
    }
}

/// Builds VMs of memory alone.
struct Host {
    flags: u8,
}

impl DestinationHost for Host {
    type Vm = Vm;

    fn build(&self, vm: &VmDescription) -> Result<Vm, VmError> {
        assert!(vm.layout.bytes() <= MAX_RAM, "more RAM than allowed");
        let ram = HeapRam::new(vm.layout.clone()).map_err(|e| VmError::because("RAM", e))?;
        let (ram, block_pages) = (Arc::new(ram), if self.flags & BLOCKS != 0 { 512 } else { 1 });
        let pager = (self.flags & PAGER != 0).then(|| Arc::new(PlainPager::new(ram.clone(), block_pages)));
        Ok(Vm { ram, pager, touches: self.flags & TOUCH != 0, loaded: false })
    }
}

struct Vm {
    ram: Arc<HeapRam>,
    pager: Option<Arc<PlainPager>>,
    touches: bool,
    loaded: bool,
}

impl DestinationVm for Vm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        self.pager.clone().map(|pager| pager as Arc<dyn Pager>)
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        assert!(!self.loaded, "a piece behind the state");
        if piece.name == "gpu" { Ok(()) } else { Err(VmError::new("no such device")) }
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        assert!(!self.loaded, "loaded twice");
        if let Some(pager) = self.pager.as_ref().filter(|_| self.touches) {
            pager.touch(PATIENCE)?;
        }
        self.loaded = state.sections.len() != 3;
        if self.loaded { Ok(()) } else { Err(VmError::new("three sections are too many")) }
    }

    fn start(&mut self, _running: bool) -> Result<(), VmError> {
        assert!(self.loaded, "started without its state");
        Ok(())
    }
}
