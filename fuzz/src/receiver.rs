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
    state::{Section, VmState},
    vm::{DestinationHost, DestinationVm, VmDescription, VmError},
    wire::{Control, Header, Preamble, SessionToken},
};

use crate::repair;

/// Most RAM of a VM.
const MAX_RAM: u64 = 4 << 20;
/// How long the receiver waits for lanes and lanes for each other; nothing waits so long unless the input says so.
const PATIENCE: Duration = Duration::from_millis(3);

/// Bit of the first byte: checksums and sequence numbers of all lanes are repaired.
pub const REPAIR: u8 = 1;
/// Bit of the first byte: bulk lanes get the session's token, whatever their input says.
pub const TOKEN: u8 = 2;

/// An input: flags, then for each of the lanes (control, three others) its length as `u16` and its bytes. What is left
/// over is the last lane's.
pub fn check(input: &[u8]) {
    let Some((&flags, mut rest)) = input.split_first() else { return };
    let mut scripts = Vec::new();
    for _ in 0..4 {
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
    let receiver = Receiver::new(Box::new(Host), options);
    let handle = receiver.handle();
    listener.ended = Some(Box::new(move || handle.stop()));
    listener.world = Some(world);
    drop(lanes);
    // it ends either because it has a VM or because it was stopped; a VM that it holds dies with it
    drop(receiver.run(&mut listener));
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
    /// Lanes whose input was read to its end, and lanes that are gone.
    drained: Vec<bool>,
    ended: Vec<bool>,
}

impl World {
    fn new(lanes: usize, flags: u8) -> Arc<Self> {
        let state = Lanes { token: None, drained: vec![false; lanes], ended: vec![false; lanes] };
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
                    drop(lane.world.wait(|lanes| lanes.token.is_some() || lanes.drained[0] || lanes.ended[0]));
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

struct Reader {
    index: usize,
    bytes: Vec<u8>,
    at: usize,
    world: Arc<World>,
}

impl Reader {
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

/// Checks what the receiver says, and takes the session's token from it.
struct Writer {
    index: usize,
    world: Arc<World>,
}

impl WriteHalf for Writer {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        let (header, body) = head.split_first_chunk::<{ Header::LEN }>().expect("a whole frame");
        let header = Header::decode(header).expect("the receiver's own header");
        let frame = Control::decode(&header, body).expect("the receiver's own frame");
        assert!(slices.is_empty(), "a receiver sends no pages");
        if let Control::Welcome(welcome) = frame {
            self.world.update(|lanes| lanes.token = Some(welcome.session));
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
struct Host;

impl DestinationHost for Host {
    fn build(&mut self, vm: &VmDescription) -> Result<Box<dyn DestinationVm>, VmError> {
        assert!(vm.layout.bytes() <= MAX_RAM, "more RAM than allowed");
        let ram = HeapRam::new(vm.layout.clone()).map_err(|e| VmError::because("RAM", e))?;
        Ok(Box::new(Vm { ram: Arc::new(ram), loaded: false }))
    }

    fn adopted(&mut self, _vm: Box<dyn DestinationVm>) {}
}

struct Vm {
    ram: Arc<HeapRam>,
    loaded: bool,
}

impl DestinationVm for Vm {
    fn ram(&self) -> Arc<dyn GuestRam> {
        self.ram.clone()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        assert!(!self.loaded, "a piece behind the state");
        if piece.name == "gpu" { Ok(()) } else { Err(VmError::new("no such device")) }
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        assert!(!self.loaded, "loaded twice");
        self.loaded = state.sections.len() != 3;
        if self.loaded { Ok(()) } else { Err(VmError::new("three sections are too many")) }
    }

    fn start(&mut self, _running: bool) -> Result<(), VmError> {
        assert!(self.loaded, "started without its state");
        Ok(())
    }
}
