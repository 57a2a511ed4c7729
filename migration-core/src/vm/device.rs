//! The trait for devices whose state moves with the VM.

use bytes::Bytes;

use crate::{
    state::{Section, VmState},
    vm::{SectionEstimate, VmError},
};

/// The two steps in which devices are quiesced, after the vCPUs were paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiesce {
    /// Start no new work. After all devices have done this step, no device sends requests to
    /// another one any more.
    StopInitiating,
    /// Finish the work in flight. After this step the device does not write guest memory any more.
    Drain,
}

/// The result of [`Device::iterate`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Iteration {
    /// A piece of state to send now. It may be empty.
    pub data: Bytes,
    /// The number of bytes of state that remain to be sent, as far as is known now.
    pub pending: u64,
}

/// A device whose state moves with the VM.
///
/// A simple device implements [`save`](Device::save) and [`load`](Device::load) only. A device with
/// a large state (VFIO, vhost) sends pieces of it while the guest runs. Its methods are called in
/// this order: [`start`](Device::start), any number of [`iterate`](Device::iterate),
/// [`quiesce`](Device::quiesce) twice, and [`save`](Device::save) for the rest.
pub trait Device: Send {
    /// Returns the name of the device's section, which is the same at both ends.
    fn name(&self) -> &str;

    /// Returns the number of the device among those of the same name.
    fn instance(&self) -> u32 {
        0
    }

    /// Returns the version of the state that [`save`](Device::save) writes.
    fn version(&self) -> u32;

    /// Returns the oldest version that [`load`](Device::load) understands. The newest is
    /// [`version`](Device::version).
    fn oldest_version(&self) -> u32 {
        self.version()
    }

    /// Returns the reason why the device cannot be migrated by the strategy named `strategy`, or
    /// `None` if it can.
    fn blocks(&self, strategy: &str) -> Option<String> {
        let _ = strategy;
        None
    }

    /// Prepares the device for a migration from this host.
    ///
    /// # Errors
    /// Returns an error if the device cannot be migrated.
    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Returns a piece of state of at most `budget` bytes, while the guest runs.
    ///
    /// # Errors
    /// Returns an error if the state cannot be read.
    fn iterate(&mut self, budget: usize) -> Result<Iteration, VmError> {
        let _ = budget;
        Ok(Iteration::default())
    }

    /// Performs one step of quiescing the device.
    ///
    /// # Errors
    /// Returns an error if the device cannot stop its work.
    fn quiesce(&mut self, step: Quiesce) -> Result<(), VmError> {
        let _ = step;
        Ok(())
    }

    /// Resumes the device's work. Called at the source after a pause that did not end in a
    /// hand-over, whichever step was reached, and at the destination when the VM starts.
    ///
    /// # Errors
    /// Returns an error if the device cannot work any more.
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Returns the approximate number of bytes that [`save`](Device::save) would return now,
    /// without the bytes that [`iterate`](Device::iterate) reports as pending. The number is used
    /// to predict the downtime, and to refuse a state that is too large before the guest is paused.
    /// The default of 0 is right for a device with a state of a few kilobytes.
    fn state_bytes(&self) -> u64 {
        0
    }

    /// Returns the state of the quiesced device, without the pieces that
    /// [`iterate`](Device::iterate) returned.
    ///
    /// # Errors
    /// Returns an error if the state cannot be read.
    fn save(&mut self) -> Result<Bytes, VmError>;

    /// Loads a piece that [`iterate`](Device::iterate) returned at the source. Pieces come in
    /// order, before [`load`](Device::load).
    ///
    /// # Errors
    /// Returns an error if the piece is invalid. The default always returns an error.
    fn load_piece(&mut self, data: &[u8]) -> Result<(), VmError> {
        let _ = data;
        Err(VmError::new(format!("device {} does not load its state in pieces", self.name())))
    }

    /// Loads the state that [`save`](Device::save) returned at the source, where the device had the
    /// version `version`.
    ///
    /// # Errors
    /// Returns an error if the state is invalid. The bytes come from the peer, so a field that
    /// decodes may still have an impossible value.
    fn load(&mut self, version: u32, data: &[u8]) -> Result<(), VmError>;
}

/// The devices of a VM.
#[derive(Default)]
pub struct DeviceSet {
    devices: Vec<Box<dyn Device>>,
}

impl DeviceSet {
    /// Returns a set of devices. They are saved and loaded in the order of `devices`.
    pub fn new(devices: Vec<Box<dyn Device>>) -> Self {
        Self { devices }
    }

    /// Returns name, instance and accepted versions of every device, for the hello.
    pub fn kinds(&self) -> Vec<DeviceKind> {
        let kind = |d: &dyn Device| DeviceKind {
            name: d.name().to_owned(),
            instance: d.instance(),
            oldest: d.oldest_version(),
            version: d.version(),
        };
        self.devices.iter().map(|d| kind(&**d)).collect()
    }

    /// Returns the first device that blocks `strategy`, and the reason, as one text.
    pub fn blocked(&self, strategy: &str) -> Option<String> {
        self.devices.iter().find_map(|d| d.blocks(strategy).map(|why| format!("device {}: {why}", d.name())))
    }

    /// Calls [`Device::start`] of every device.
    ///
    /// # Errors
    /// Returns the error of the first device that fails.
    pub fn start(&mut self) -> Result<(), VmError> {
        self.devices.iter_mut().try_for_each(|d| d.start())
    }

    /// Returns pieces of state of all devices, of at most `budget` bytes together, and the number
    /// of bytes that are pending.
    ///
    /// # Errors
    /// Returns the error of the first device that fails.
    pub fn iterate(&mut self, mut budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        let (mut pieces, mut pending) = (Vec::new(), 0u64);
        for d in &mut self.devices {
            let Iteration { data, pending: left } = d.iterate(budget)?;
            budget = budget.saturating_sub(data.len());
            pending = pending.saturating_add(left);
            if !data.is_empty() {
                let name = d.name().to_owned();
                pieces.push(Section { name, instance: d.instance(), version: d.version(), data });
            }
        }
        Ok((pieces, pending))
    }

    /// Returns the size of each device's section for
    /// [`SourceVm::estimate_state`](crate::vm::SourceVm::estimate_state), without devices that
    /// report 0.
    pub fn estimates(&self) -> Vec<SectionEstimate> {
        let estimate = |d: &dyn Device| SectionEstimate {
            name: d.name().to_owned(),
            instance: d.instance(),
            bytes: d.state_bytes(),
        };
        self.devices.iter().map(|d| estimate(&**d)).filter(|e| e.bytes > 0).collect()
    }

    /// Quiesces all devices step by step: every device stops new work before the first one drains.
    ///
    /// # Errors
    /// Returns the error of the first device that fails.
    pub fn quiesce(&mut self) -> Result<(), VmError> {
        for step in [Quiesce::StopInitiating, Quiesce::Drain] {
            self.devices.iter_mut().try_for_each(|d| d.quiesce(step))?;
        }
        Ok(())
    }

    /// Calls [`Device::resume`] of every device, even if one fails.
    ///
    /// # Errors
    /// Returns the error of the first device that failed.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.devices.iter_mut().map(|d| d.resume()).fold(Ok(()), Result::and)
    }

    /// Adds the section of every device to `state`.
    ///
    /// # Errors
    /// Returns the error of the first device that fails.
    pub fn save(&mut self, state: &mut VmState) -> Result<(), VmError> {
        for d in &mut self.devices {
            let data = d.save()?;
            let name = d.name().to_owned();
            state.sections.push(Section { name, instance: d.instance(), version: d.version(), data });
        }
        Ok(())
    }

    /// Passes a piece of state to the device to which it belongs.
    ///
    /// # Errors
    /// Returns an error if there is no such device, or if the device does not know the version or
    /// refuses the piece.
    pub fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        let device = self.devices.iter_mut().find(|d| d.name() == piece.name && d.instance() == piece.instance);
        match device {
            Some(d) if (d.oldest_version()..=d.version()).contains(&piece.version) => d.load_piece(&piece.data),
            Some(d) => Err(VmError::version(&piece.name, piece.version, d.oldest_version(), d.version())),
            None => Err(VmError::new(format!("no device {} {}", piece.name, piece.instance))),
        }
    }

    /// Loads every device from its section, in the order of this set.
    ///
    /// # Errors
    /// Returns an error if a section is missing, has a version that the device does not know, or is
    /// refused by the device.
    pub fn load(&mut self, state: &VmState) -> Result<(), VmError> {
        for d in &mut self.devices {
            let section = state
                .find(d.name(), d.instance())
                .ok_or_else(|| VmError::new(format!("the state has no section {} {}", d.name(), d.instance())))?;
            if !(d.oldest_version()..=d.version()).contains(&section.version) {
                return Err(VmError::version(d.name(), section.version, d.oldest_version(), d.version()));
            }
            d.load(section.version, &section.data)?;
        }
        Ok(())
    }
}

/// The description of a device in a hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// The name of the device.
    pub name: String,
    /// The number of the device among those of the same name.
    pub instance: u32,
    /// The oldest version of state that the device can load.
    pub oldest: u32,
    /// The version of state that the device saves.
    pub version: u32,
}

impl DeviceKind {
    /// Returns the reason why `destination`, the devices at the destination, cannot load the state
    /// of this device, or `None` if they can.
    pub fn mismatch(&self, destination: &[DeviceKind]) -> Option<String> {
        let twin = destination.iter().find(|d| d.name == self.name && d.instance == self.instance);
        match twin {
            None => Some(format!("the destination has no device {} {}", self.name, self.instance)),
            Some(d) if !(d.oldest..=d.version).contains(&self.version) => {
                Some(VmError::version(&self.name, self.version, d.oldest, d.version).to_string())
            }
            Some(_) => None,
        }
    }
}
