//! The life of a device through a migration.

use bytes::Bytes;

use crate::{
    state::{Section, VmState},
    vm::{SectionEstimate, VmError},
};

/// The two steps in which devices come to rest, after the vCPUs were paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiesce {
    /// Start no new work. When every device has done this step, none asks another one for anything any more.
    StopInitiating,
    /// Finish the work in flight; afterwards guest memory is not written any more.
    Drain,
}

/// What one iteration of a device's state gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Iteration {
    /// A piece of state to send now; may be empty.
    pub data: Bytes,
    /// How many bytes of state are still to come, as far as is known now.
    pub pending: u64,
}

/// A device whose state moves with the VM.
///
/// A plain device implements [`save`](Device::save) and [`load`](Device::load) and nothing else. One with a large
/// state (VFIO, vhost) sends pieces of it while the guest runs: [`start`](Device::start), any number of
/// [`iterate`](Device::iterate), then `quiesce` twice, and `save` for the rest.
pub trait Device: Send {
    /// Name of its section; the same at both ends.
    fn name(&self) -> &str;

    /// Which of several of that name.
    fn instance(&self) -> u32 {
        0
    }

    /// Version of the state that [`save`](Device::save) writes.
    fn version(&self) -> u32;

    /// The oldest version that [`load`](Device::load) understands; the newest is [`version`](Device::version).
    fn oldest_version(&self) -> u32 {
        self.version()
    }

    /// Why it cannot take part in a migration by the strategy of this name, if so.
    fn blocks(&self, strategy: &str) -> Option<String> {
        let _ = strategy;
        None
    }

    /// A migration begins at the source.
    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// A piece of state of at most `budget` bytes, while the guest runs.
    fn iterate(&mut self, budget: usize) -> Result<Iteration, VmError> {
        let _ = budget;
        Ok(Iteration::default())
    }

    /// Comes to rest, one step.
    fn quiesce(&mut self, step: Quiesce) -> Result<(), VmError> {
        let _ = step;
        Ok(())
    }

    /// Takes up work again at the source, after a pause that did not end in a hand-over (whatever step it was in),
    /// or at the destination when the VM starts.
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Returns about how many bytes [`save`](Device::save) would give now, beside what [`iterate`](Device::iterate) reports as
    /// pending; for the predicted downtime, and to refuse what is too large before the guest is paused. 0 by default: right
    /// for any device whose state is a few kilobytes.
    fn state_bytes(&self) -> u64 {
        0
    }

    /// The (rest of the) state, at rest.
    fn save(&mut self) -> Result<Bytes, VmError>;

    /// Takes a piece that [`iterate`](Device::iterate) gave at the source; pieces come in order, before `load`.
    fn load_piece(&mut self, data: &[u8]) -> Result<(), VmError> {
        let _ = data;
        Err(VmError::new(format!("device {} does not take its state in pieces", self.name())))
    }

    /// Takes the state that [`save`](Device::save) gave at the source, which had this version.
    ///
    /// # Errors
    /// When the bytes make no sense: they come from the peer, and a field that decodes may still be nonsense.
    fn load(&mut self, version: u32, data: &[u8]) -> Result<(), VmError>;
}

/// A VM's devices, taken through their life together.
#[derive(Default)]
pub struct DeviceSet {
    devices: Vec<Box<dyn Device>>,
}

impl DeviceSet {
    /// A set of these devices, which are saved and loaded in this order.
    pub fn new(devices: Vec<Box<dyn Device>>) -> Self {
        Self { devices }
    }

    /// Names, instances and accepted versions of all devices, for the hello.
    pub fn kinds(&self) -> Vec<DeviceKind> {
        let kind = |d: &dyn Device| DeviceKind {
            name: d.name().to_owned(),
            instance: d.instance(),
            oldest: d.oldest_version(),
            version: d.version(),
        };
        self.devices.iter().map(|d| kind(&**d)).collect()
    }

    /// The first device that blocks `strategy`, and why.
    pub fn blocked(&self, strategy: &str) -> Option<String> {
        self.devices.iter().find_map(|d| d.blocks(strategy).map(|why| format!("device {}: {why}", d.name())))
    }

    /// A migration begins at the source: [`Device::start`] for each.
    pub fn start(&mut self) -> Result<(), VmError> {
        self.devices.iter_mut().try_for_each(|d| d.start())
    }

    /// Pieces of state while the guest runs, together at most `budget` bytes; and how many bytes are pending.
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

    /// Returns the sizes of those devices' sections that report one, for
    /// [`SourceVm::estimate_state`](crate::vm::SourceVm::estimate_state).
    pub fn estimates(&self) -> Vec<SectionEstimate> {
        let estimate = |d: &dyn Device| SectionEstimate {
            name: d.name().to_owned(),
            instance: d.instance(),
            bytes: d.state_bytes(),
        };
        self.devices.iter().map(|d| estimate(&**d)).filter(|e| e.bytes > 0).collect()
    }

    /// Brings all to rest, step by step: no device drains before all have stopped to initiate.
    pub fn quiesce(&mut self) -> Result<(), VmError> {
        for step in [Quiesce::StopInitiating, Quiesce::Drain] {
            self.devices.iter_mut().try_for_each(|d| d.quiesce(step))?;
        }
        Ok(())
    }

    /// Takes up work again: [`Device::resume`] for each, all of them even if one fails.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.devices.iter_mut().map(|d| d.resume()).fold(Ok(()), Result::and)
    }

    /// Adds every device's section to `state`.
    pub fn save(&mut self, state: &mut VmState) -> Result<(), VmError> {
        for d in &mut self.devices {
            let data = d.save()?;
            let name = d.name().to_owned();
            state.sections.push(Section { name, instance: d.instance(), version: d.version(), data });
        }
        Ok(())
    }

    /// Gives a piece to the device it belongs to.
    pub fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        let device = self.devices.iter_mut().find(|d| d.name() == piece.name && d.instance() == piece.instance);
        match device {
            Some(d) if (d.oldest_version()..=d.version()).contains(&piece.version) => d.load_piece(&piece.data),
            Some(d) => Err(VmError::version(&piece.name, piece.version, d.oldest_version(), d.version())),
            None => Err(VmError::new(format!("no device {} {}", piece.name, piece.instance))),
        }
    }

    /// Loads every device from its section, in this set's order.
    ///
    /// # Errors
    /// When a section is missing, has a version that the device does not know, or is refused by it.
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

/// What a hello says of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// Its name.
    pub name: String,
    /// Which of several of that name.
    pub instance: u32,
    /// The oldest version of state it can load.
    pub oldest: u32,
    /// The version of state it saves.
    pub version: u32,
}

impl DeviceKind {
    /// Why `destination`, a list of the devices there, cannot take the state of this one; `None` if it can.
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
