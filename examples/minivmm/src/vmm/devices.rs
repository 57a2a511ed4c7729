//! The port bus: a serial port at 0x3f8, nothing else.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use migration_core::{
    codec::{Reader, Writer},
    device::Device,
    vm::VmError,
};
use vm_superio::{Serial, SerialState, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

const SERIAL_BASE: u16 = 0x3f8;
const SERIAL_PORTS: u16 = 8;
/// The line that the serial port interrupts on.
pub(super) const SERIAL_GSI: u32 = 4;
/// Output that is kept while the file takes none; beyond it the oldest bytes are dropped, and counted.
const MAX_PENDING: usize = 64 << 10;
/// Longest receive buffer of the port.
const MAX_INPUT: usize = 64;

/// Where the serial port's output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SerialTarget {
    Stdio,
    Null,
    /// Appended to.
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

impl SerialTarget {
    fn open(&self) -> io::Result<Output> {
        let (sink, name): (Option<Sink>, String) = match self {
            Self::Stdio => (Some(Sink::Stdout(io::stdout())), "stdout".into()),
            Self::Null => (None, "null".into()),
            Self::File(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                let name = path.display().to_string();
                let context = |e: io::Error| io::Error::new(e.kind(), format!("serial file {name}: {e}"));
                (Some(Sink::File(file.map_err(context)?)), name)
            }
        };
        Ok(Output { sink, name, pending: VecDeque::new(), dropped: 0, failure: None })
    }
}

enum Sink {
    Stdout(io::Stdout),
    File(File),
}

/// Output that never stops the guest: what cannot be written now is kept and tried again with the next byte.
pub(super) struct Output {
    sink: Option<Sink>,
    name: String,
    pending: VecDeque<u8>,
    dropped: u64,
    failure: Option<String>,
}

impl Output {
    fn drain(&mut self) {
        let Some(sink) = &mut self.sink else {
            self.pending.clear();
            return;
        };
        while !self.pending.is_empty() {
            let (head, _) = self.pending.as_slices();
            let written = match sink {
                Sink::Stdout(out) => out.write(head).and_then(|n| out.flush().map(|()| n)),
                Sink::File(file) => file.write(head),
            };
            match written {
                Ok(0) => return,
                Ok(n) => {
                    self.pending.drain(..n);
                    self.failure = None;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    if self.failure.is_none() {
                        eprintln!("minivmm: serial output to {}: {e}; the guest goes on, output is kept", self.name);
                    }
                    self.failure = Some(e.to_string());
                    return;
                }
            }
        }
    }

    fn warning(&self) -> Option<String> {
        let why = self.failure.as_ref()?;
        Some(format!("serial output to {}: {why}; {} bytes wait, {} were dropped", self.name, self.pending.len(), self.dropped))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if self.pending.len() >= MAX_PENDING {
                self.pending.pop_front();
                self.dropped += 1;
            }
            self.pending.push_back(byte);
        }
        self.drain();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.drain();
        Ok(())
    }
}

/// Raises the serial port's interrupt line.
pub(super) struct Line(pub(super) EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Port = Serial<Line, NoEvents, Output>;

/// The ports of the machine, and the device behind them.
pub(super) struct Bus {
    serial: Mutex<Option<Port>>,
}

impl Bus {
    /// A bus with a serial port that writes to `target` and interrupts through `line`.
    pub(super) fn new(target: &SerialTarget, line: EventFd) -> io::Result<Arc<Self>> {
        let serial = Serial::new(Line(line), target.open()?);
        Ok(Arc::new(Self { serial: Mutex::new(Some(serial)) }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Port>> {
        self.serial.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn port_write(&self, port: u16, data: &[u8]) {
        if let (Some(offset), [value]) = (serial_offset(port), data)
            && let Some(serial) = self.lock().as_mut()
        {
            // an interrupt that cannot be raised is one that the guest did not ask for: it polls
            let _ = serial.write(offset, *value);
        }
    }

    pub(super) fn port_read(&self, port: u16, data: &mut [u8]) {
        match (serial_offset(port), self.lock().as_mut()) {
            (Some(offset), Some(serial)) if data.len() == 1 => data[0] = serial.read(offset),
            // nothing is there: a PC's bus floats high
            _ => data.fill(0xff),
        }
    }

    /// What the user should know of the output.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.lock().as_ref().and_then(|s| s.writer().warning()).into_iter().collect()
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_BASE)?;
    (offset < SERIAL_PORTS).then_some(offset as u8)
}

/// The serial port as a device that migrates.
pub(super) struct SerialDevice(pub(super) Arc<Bus>);

impl Device for SerialDevice {
    fn name(&self) -> &str {
        "serial"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&mut self) -> Result<Bytes, VmError> {
        let mut serial = self.0.lock();
        let serial = serial.as_mut().ok_or_else(|| VmError::new("the serial port is gone"))?;
        // what is still here would be lost with this process
        let _ = serial.writer_mut().flush();
        let s = serial.state();
        let mut w = Writer::new();
        w.bytes(&[s.baud_divisor_low, s.baud_divisor_high, s.interrupt_enable, s.interrupt_identification]);
        w.bytes(&[s.line_control, s.line_status, s.modem_control, s.modem_status, s.scratch]);
        w.blob(&s.in_buffer);
        Ok(w.into_bytes().into())
    }

    fn load(&mut self, _version: u32, data: &[u8]) -> Result<(), VmError> {
        let malformed = |e| VmError::because("state of the serial port", e);
        let mut r = Reader::new(data);
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] =
            r.array("registers").map_err(malformed)?;
        let in_buffer = r.blob(MAX_INPUT, "received bytes").map_err(malformed)?.to_vec();
        r.finish().map_err(malformed)?;
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
        let line = old.interrupt_evt().0.try_clone().map_err(|e| VmError::because("the serial line", e))?;
        let loaded = Serial::from_state(&state, Line(line), NoEvents, old.into_writer());
        *slot = Some(loaded.map_err(|e| VmError::new(format!("state of the serial port makes no sense: {e:?}")))?);
        Ok(())
    }
}
