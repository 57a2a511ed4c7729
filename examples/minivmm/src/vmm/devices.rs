//! The port bus: a serial port at 0x3f8, and the [balloon](super::balloon).

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, TryLockError},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use guests::layout::balloon;
use migration_core::{
    codec::{Reader, Writer},
    device::Device,
    vm::VmError,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_superio::{Serial, SerialState, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use super::balloon::Balloon;

const SERIAL_BASE: u16 = 0x3f8;
const SERIAL_PORTS: u16 = 8;
/// The interrupt line of the serial port.
pub(super) const SERIAL_GSI: u32 = 4;
/// The most bytes of output that are kept while the file accepts none, or while output is held for
/// checkpoints. A byte costs the guest an exit, so this is at least 20 s of output. Beyond this
/// limit, the oldest bytes are dropped and counted.
const MAX_PENDING: usize = 1 << 20;
/// The longest time that a query of the port waits for a vCPU that uses the port.
const MAX_IN_USE: Duration = Duration::from_millis(200);
/// The longest receive buffer of the port, in bytes.
const MAX_INPUT: usize = 64;

/// The target of the serial port's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// The stdout of this process.
    Stdio,
    /// No target.
    Null,
    /// A file, to which output is appended.
    File(PathBuf),
}

impl From<&str> for SerialTarget {
    fn from(text: &str) -> Self {
        match text {
            "stdio" => Self::Stdio,
            "null" => Self::Null,
            path => Self::File(path.into()),
        }
    }
}

/// The state of the serial port's output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SerialOutput {
    /// The target of the output.
    pub(crate) to: String,
    /// The number of bytes that the VM has put out in its life.
    pub(crate) made: u64,
    /// The number of those bytes that wait to be written.
    pub(crate) pending: u64,
    /// The number of bytes that were dropped here.
    pub(crate) dropped: u64,
    /// The reason why the last write failed.
    pub(crate) failure: Option<String>,
}

impl SerialTarget {
    /// Returns an error if the target cannot be written to. For a target that is opened only when
    /// its VM has arrived.
    pub(crate) fn check(&self) -> io::Result<()> {
        self.open().map(drop)
    }

    fn open(&self) -> io::Result<Output> {
        let (sink, name) = match self {
            Self::Stdio => (Some(stdout()?), "stdout".into()),
            Self::Null => (None, "null".into()),
            Self::File(path) => {
                let name = path.display().to_string();
                let context = |e: io::Error| io::Error::new(e.kind(), format!("serial file {name}: {e}"));
                (Some(open_file(path).map_err(context)?), name)
            }
        };
        Ok(Output {
            sink,
            name,
            pending: VecDeque::new(),
            made: 0,
            first: None,
            dropped: 0,
            failure: None,
            told: false,
            held: false,
            limit: None,
        })
    }
}

/// Opens a file so that neither opening nor writing it waits for another process. A FIFO accepts
/// bytes while there is room, whether or not a process reads the FIFO yet.
fn open_file(path: &Path) -> io::Result<File> {
    let found = path.metadata().ok().map(|metadata| metadata.file_type());
    if found.is_some_and(|found| found.is_socket()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket cannot be opened as a file"));
    }
    // a FIFO can be opened for writing alone only while a process reads it
    let reads = found.is_some_and(|found| found.is_fifo());
    OpenOptions::new()
        .read(reads)
        .append(true)
        .create(!reads)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

/// Returns stdout as a separate descriptor. `Stdout` would repeat a write by itself, and nobody
/// could stop that.
fn stdout() -> io::Result<File> {
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let kind = stdout.metadata()?.file_type();
    if kind.is_fifo() || kind.is_char_device() {
        // Other processes may write to the same pipe or terminal, and fill it between the check for
        // room and a write. So this descriptor must be non-blocking. Their descriptors must not
        // change, so stdout is opened again.
        let again =
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open("/proc/self/fd/1");
        return Ok(again.unwrap_or(stdout));
    }
    Ok(stdout)
}

/// Output that delays neither the guest nor a pause of the guest. Bytes that cannot be written now
/// are kept, and move with the VM. They are tried again with the next byte, or when the status of
/// the machine is requested.
pub(super) struct Output {
    sink: Option<File>,
    name: String,
    pending: VecDeque<u8>,
    /// The number of bytes that the VM has put out in its life, including those that are pending.
    made: u64,
    /// The offset of the VM's first byte in the file, even if that byte was not written there.
    /// Known once the VM is here.
    first: Option<i64>,
    dropped: u64,
    failure: Option<String>,
    /// Whether the log contains that a write failed. Nothing more is logged until all is written.
    told: bool,
    /// Whether the pending bytes belong to a state that was saved or loaded. The process that owns
    /// the VM in the end writes them.
    held: bool,
    /// The number of bytes of output that may be written. Output beyond it is kept until a
    /// checkpoint that contains that output is safe.
    limit: Option<u64>,
}

impl Output {
    /// Returns the number of bytes of the output that are written.
    fn written(&self) -> u64 {
        self.made - self.pending.len() as u64
    }

    /// Returns the length of the file in bytes, or `None` if the target is not a regular file.
    fn file_len(&self) -> Option<i64> {
        let metadata = self.sink.as_ref()?.metadata().ok()?;
        metadata.is_file().then_some(metadata.len() as i64)
    }

    /// Records that the VM is here: its next byte follows what the file has now.
    fn locate(&mut self) {
        let written = self.written() as i64;
        self.first = self.first.or_else(|| Some(self.file_len()? - written));
    }

    /// Drops the pending bytes that another host has already written to the same file.
    fn leave_out_what_is_written(&mut self) {
        let (Some(first), Some(len)) = (self.first, self.file_len()) else { return };
        let twice = (len - first).saturating_sub(self.written() as i64).clamp(0, self.pending.len() as i64);
        self.pending.drain(..twice as usize);
    }

    fn drain(&mut self) {
        while !self.held && !self.pending.is_empty() {
            let room = self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.written()));
            if room == 0 {
                return;
            }
            let Some(sink) = &mut self.sink else {
                self.pending.clear();
                return;
            };
            let (head, _) = self.pending.as_slices();
            // a pipe that polls as writable accepts this much at once, so no vCPU thread blocks
            // here
            let written = match writable(sink) {
                Ok(true) => sink.write(&head[..head.len().min(libc::PIPE_BUF).min(room as usize)]),
                Ok(false) => Err(io::Error::new(io::ErrorKind::WouldBlock, "nobody reads it")),
                Err(e) => Err(e),
            };
            match written {
                Ok(0) => return self.failed("it takes no bytes".into()),
                Ok(n) => {
                    self.pending.drain(..n);
                    self.failure = None;
                    // a slow reader makes writes fail again and again, so the log reports only the
                    // first failure
                    self.told &= !self.pending.is_empty();
                }
                // a kick has interrupted the write
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return self.failed(e.to_string()),
            }
        }
    }

    fn failed(&mut self, why: String) {
        if !std::mem::replace(&mut self.told, true) {
            log!("serial output to {}: {why}; the guest goes on, output is kept", self.name);
        }
        self.failure = Some(why);
    }

    fn push(&mut self, byte: u8) {
        if self.pending.len() >= MAX_PENDING {
            if self.dropped == 0 {
                log!("serial output to {}: more than {MAX_PENDING} bytes wait, the oldest are dropped", self.name);
            }
            self.pending.pop_front();
            self.dropped += 1;
        }
        self.made += 1;
        self.pending.push_back(byte);
    }

    fn release(&mut self) {
        self.held = false;
        self.drain();
    }

    fn so_far(&self) -> SerialOutput {
        SerialOutput {
            to: self.name.clone(),
            made: self.made,
            pending: self.pending.len() as u64,
            dropped: self.dropped,
            failure: self.failure.clone(),
        }
    }

    fn warning(&self) -> Option<String> {
        let (name, waiting, dropped) = (&self.name, self.pending.len(), self.dropped);
        match &self.failure {
            Some(why) => Some(format!("serial output to {name}: {why}; {waiting} bytes wait, {dropped} were dropped")),
            None if dropped > 0 => Some(format!("serial output to {name}: {dropped} bytes were dropped")),
            None => None,
        }
    }
}

/// Returns whether a write would not block. Always true for a regular file.
fn writable(file: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|&byte| self.push(byte));
        self.drain();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.drain();
        Ok(())
    }
}

/// Raises the serial port's interrupt line. The descriptor is shared, so that no descriptor is
/// opened when a state is loaded in the pause of a migration.
#[derive(Clone)]
pub(super) struct Line(pub(super) Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Port = Serial<Line, NoEvents, Output>;

/// The ports of the machine, with the devices at them.
pub(super) struct Bus {
    serial: Mutex<Option<Port>>,
    pub(super) balloon: Arc<Balloon>,
}

impl Bus {
    /// Returns a bus with a serial port that writes to `target` and interrupts through `line`, and
    /// with this balloon.
    pub(super) fn new(target: &SerialTarget, line: EventFd, balloon: Arc<Balloon>) -> io::Result<Arc<Self>> {
        let serial = Serial::new(Line(Arc::new(line)), target.open()?);
        Ok(Arc::new(Self { serial: Mutex::new(Some(serial)), balloon }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Port>> {
        self.serial.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn write(&self, port: u16, data: &[u8]) {
        if let (Some(offset), [value]) = (serial_offset(port), data)
            && let Some(serial) = self.lock().as_mut()
        {
            // An interrupt that cannot be raised is one that the guest has not requested, because
            // it polls.
            let _ = serial.write(offset, *value);
        } else if let (Some(offset), [value]) = (balloon_offset(port), data) {
            self.balloon.write(offset, *value);
        }
    }

    pub(super) fn read(&self, port: u16, data: &mut [u8]) {
        if let (Some(offset), [value]) = (balloon_offset(port), &mut *data) {
            *value = self.balloon.read(offset);
            return;
        }
        match (serial_offset(port), self.lock().as_mut()) {
            (Some(offset), Some(serial)) if data.len() == 1 => data[0] = serial.read(offset),
            // no device is there: a PC's bus floats high
            _ => data.fill(0xff),
        }
    }

    /// Holds back output from now on, except for output that comes with a state that is loaded.
    pub(super) fn hold_output(&self) {
        if let Some(serial) = self.lock().as_mut() {
            let output = serial.writer_mut();
            output.limit = Some(output.made);
        }
    }

    /// Returns the number of bytes of output in the VM's life.
    pub(super) fn output(&self) -> u64 {
        self.lock().as_ref().map_or(0, |serial| serial.writer().made)
    }

    /// Releases output up to the byte `until`, or all output.
    pub(super) fn release_output(&self, until: Option<u64>) {
        if let Some(serial) = self.lock().as_mut() {
            let output = serial.writer_mut();
            output.limit = until;
            output.drain();
        }
    }

    /// Drops the pending output that was written meanwhile. Called after a restart from a
    /// checkpoint.
    pub(super) fn leave_out_what_is_written(&self) {
        if let Some(serial) = self.lock().as_mut() {
            serial.writer_mut().leave_out_what_is_written();
        }
    }

    /// Locks the port as [`lock`](Self::lock) does. Returns `None` if a vCPU's thread that uses the
    /// port does not release it in time.
    fn lock_in_time(&self) -> Option<MutexGuard<'_, Option<Port>>> {
        let began = Instant::now();
        loop {
            match self.serial.try_lock() {
                Ok(serial) => return Some(serial),
                Err(TryLockError::Poisoned(e)) => return Some(e.into_inner()),
                Err(TryLockError::WouldBlock) if began.elapsed() >= MAX_IN_USE => return None,
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Makes every vCPU that uses the port wait there until the guard is dropped.
    #[cfg(test)]
    pub(super) fn block(&self) -> impl Drop + '_ {
        self.lock()
    }

    /// Returns the state of the output, or zeros if the port is in use for too long.
    pub(super) fn serial_output(&self) -> SerialOutput {
        let serial = self.lock_in_time();
        serial.as_deref().and_then(Option::as_ref).map_or_else(SerialOutput::default, |s| s.writer().so_far())
    }

    /// Returns the warnings for the user about the output and the balloon, after another attempt to
    /// write pending output. Does not wait for a vCPU for longer than [`MAX_IN_USE`].
    pub(super) fn warnings(&self) -> Vec<String> {
        let warning = match self.lock_in_time() {
            Some(mut serial) => serial.as_mut().and_then(|s| {
                s.writer_mut().drain();
                s.writer().warning()
            }),
            None => Some("the serial port is in use, and a vCPU waits there".into()),
        };
        warning.into_iter().chain(self.balloon.warning()).collect()
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_BASE)?;
    (offset < SERIAL_PORTS).then_some(offset as u8)
}

fn balloon_offset(port: u16) -> Option<u16> {
    port.checked_sub(balloon::BASE).filter(|&offset| offset < balloon::PORTS)
}

/// The approximate size of the serial port's state in bytes, without pending output.
const SERIAL_REGISTERS: usize = 64;

/// The serial port as a device that migrates.
pub(super) struct SerialDevice(pub(super) Arc<Bus>);

impl Device for SerialDevice {
    fn name(&self) -> &str {
        "serial"
    }

    // version 2 added the output that could not be written yet, version 3 the amount of all output
    fn version(&self) -> u32 {
        3
    }

    // pending output moves with the VM
    fn state_bytes(&self) -> u64 {
        self.0.lock().as_ref().map_or(0, |serial| (SERIAL_REGISTERS + serial.writer().pending.len()) as u64)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if let Some(serial) = self.0.lock().as_mut() {
            serial.writer_mut().release();
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Bytes, VmError> {
        let mut serial = self.0.lock();
        let serial = serial.as_mut().ok_or_else(|| VmError::new("the serial port is gone"))?;
        // output that cannot be written now is written by the destination, unless the VM stays
        let output = serial.writer_mut();
        output.drain();
        output.held = true;
        output.locate();
        let pending: Vec<u8> = output.pending.iter().copied().collect();
        let made = output.made;
        let s = serial.state();
        let mut w = Writer::new();
        w.bytes(&[s.baud_divisor_low, s.baud_divisor_high, s.interrupt_enable, s.interrupt_identification]);
        w.bytes(&[s.line_control, s.line_status, s.modem_control, s.modem_status, s.scratch]);
        w.blob(&s.in_buffer).blob(&pending).u64(made);
        Ok(w.into_bytes().into())
    }

    fn load(&mut self, _version: u32, data: &[u8]) -> Result<(), VmError> {
        let malformed = |e| VmError::because("state of the serial port", e);
        let mut r = Reader::new(data);
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] =
            r.array("registers").map_err(malformed)?;
        let in_buffer = r.blob(MAX_INPUT, "received bytes").map_err(malformed)?.to_vec();
        let pending = r.blob(MAX_PENDING, "output that waits").map_err(malformed)?;
        let made = r.u64("bytes put out").map_err(malformed)?;
        r.finish().map_err(malformed)?;
        if made < pending.len() as u64 {
            return Err(VmError::new(format!("{} bytes of output wait, of {made}", pending.len())));
        }
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer,
        };
        let mut slot = self.0.lock();
        let old = slot.take().ok_or_else(|| VmError::new("the serial port is gone"))?;
        let line = old.interrupt_evt().clone();
        let mut output = old.into_writer();
        output.pending = pending.iter().copied().collect();
        output.made = made;
        output.limit = output.limit.map(|_| made);
        output.held = true;
        output.locate();
        // This raises the interrupt again if one is pending. The interrupt that was raised at the
        // source may not have reached the saved irqchip.
        let loaded = Serial::from_state(&state, line, NoEvents, output);
        *slot = Some(loaded.map_err(|e| VmError::new(format!("state of the serial port makes no sense: {e:?}")))?);
        Ok(())
    }
}
