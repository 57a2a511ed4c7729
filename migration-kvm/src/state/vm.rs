//! The state of a VM apart from vCPUs and RAM: clock, interrupt controllers and timer.

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_pit_state2,
};
use kvm_ioctls::{Cap, VmFd};
use migration_core::codec::DecodeError;

use super::{
    StateError, VcpuSaver, io_error, ioctl_error,
    items::{ItemWriter, Items, OPTIONAL},
    sys::{self, CHIP_SIZE},
};

/// The largest number of names of absent parts, and the largest length of a name in bytes.
const MAX_UNSUPPORTED: usize = 64;
const MAX_UNSUPPORTED_NAME: usize = 256;

const ITEM_IRQCHIP: u16 = 1;
const ITEM_PIC_MASTER: u16 = 2;
const ITEM_PIC_SLAVE: u16 = 3;
const ITEM_IOAPIC: u16 = 4;
const ITEM_PIT: u16 = 5;
const ITEM_CLOCK: u16 = 6;
const ITEM_UNSUPPORTED: u16 = 7 | OPTIONAL;

/// The interrupt controllers that KVM emulates for a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Irqchip {
    /// None. The VMM emulates all, or the guest has none.
    None = 0,
    /// The LAPICs only (`KVM_CAP_SPLIT_IRQCHIP`). The VMM emulates PIC and IOAPIC.
    #[default]
    Split = 1,
    /// LAPICs, PICs and IOAPIC (`KVM_CREATE_IRQCHIP`), and the PIT if it was created.
    Full = 2,
}

impl Irqchip {
    pub(super) fn from_u8(value: u8) -> Result<Self, DecodeError> {
        match value {
            0 => Ok(Self::None),
            1 => Ok(Self::Split),
            2 => Ok(Self::Full),
            other => Err(DecodeError::invalid("irqchip", format!("{other} is no kind of irqchip"))),
        }
    }

    /// Returns the kind in words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "no irqchip",
            Self::Split => "a split irqchip",
            Self::Full => "a full irqchip",
        }
    }
}

/// The three interrupt controllers that KVM emulates in addition to the LAPICs, in the format of
/// `KVM_GET_IRQCHIP`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chips {
    /// The master PIC.
    pub pic_master: [u8; CHIP_SIZE],
    /// The slave PIC.
    pub pic_slave: [u8; CHIP_SIZE],
    /// The IOAPIC.
    pub ioapic: [u8; CHIP_SIZE],
}

/// The state of a VM apart from vCPUs and RAM.
#[derive(Clone, Debug, PartialEq)]
pub struct KvmState {
    /// The interrupt controllers that KVM emulates.
    pub irqchip: Irqchip,
    /// The state of these controllers; present with [`Irqchip::Full`].
    pub chips: Option<Box<Chips>>,
    /// The programmable interval timer, if KVM emulates it.
    pub pit: Option<kvm_pit_state2>,
    /// The clock from which guests' kvmclocks are derived, in nanoseconds. Its flags tell whether
    /// it includes the wall-clock time and the host TSC of the same moment.
    pub clock: Option<kvm_clock_data>,
    unsupported: Vec<String>,
}

/// Proof that the VM's clock was loaded, which is needed to load vCPUs. It relates the clocks of
/// source and destination.
#[derive(Clone, Debug, Default)]
pub struct ClockLoaded {
    source: Option<kvm_clock_data>,
    here: Option<kvm_clock_data>,
}

impl ClockLoaded {
    /// Returns a value for a VM without a clock. TSCs are then written and not computed.
    pub fn none() -> Self {
        Self::default()
    }

    /// Returns the TSC offset with which the guest's TSC here has the value that it would have if
    /// the guest had continued at the source. `offset` is the offset at the source. Both hosts'
    /// TSCs have the frequency `khz`.
    ///
    /// At one moment at the source, the host's TSC was `t0` and the VM's clock `c0`. At a later
    /// moment here, they are `t1` and `c1`. The VM's clock advanced by `c1 - c0` between these
    /// moments, and the guest's TSC must advance by the same time: `t1 + offset1 = t0 + offset0 +
    /// (c1 - c0) · khz`. Returns `None` if one of the KVMs does not report its TSC with the clock.
    pub(super) fn tsc_offset(&self, offset: u64, khz: u32) -> Option<u64> {
        let has_tsc = |clock: &&kvm_clock_data| clock.flags & KVM_CLOCK_HOST_TSC != 0;
        let (source, here) = (self.source.as_ref().filter(has_tsc)?, self.here.as_ref().filter(has_tsc)?);
        let elapsed = i128::from(here.clock) - i128::from(source.clock);
        let ticks = (elapsed * i128::from(khz) / 1_000_000) as u64;
        Some(source.host_tsc.wrapping_add(offset).wrapping_add(ticks).wrapping_sub(here.host_tsc))
    }
}

impl KvmState {
    /// Reads the state. All vCPUs must be stopped.
    ///
    /// # Errors
    /// Fails if KVM refuses, and with [`Irqchip::Full`] also if the VM has no irqchip.
    pub fn save(saver: &VcpuSaver, vm: &VmFd, irqchip: Irqchip) -> Result<Self, StateError> {
        let chip = |id| sys::chip(vm, id).map_err(io_error("KVM_GET_IRQCHIP"));
        let (mut chips, mut pit) = (None, None);
        if irqchip == Irqchip::Full {
            chips = Some(Box::new(Chips {
                pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
                pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
                ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            }));
            pit = match vm.get_pit2() {
                Ok(pit) => Some(pit),
                Err(e) if matches!(e.errno(), libc::ENXIO | libc::EINVAL | libc::ENOTTY) => None,
                Err(e) => return Err(ioctl_error("KVM_GET_PIT2")(e)),
            };
        }
        let clock = vm.get_clock().ok();
        Ok(Self { irqchip, chips, pit, clock, unsupported: saver.unsupported().to_vec() })
    }

    /// Returns the names of the parts of the state that the source's KVM does not have and did not
    /// save.
    pub fn unsupported(&self) -> &[String] {
        &self.unsupported
    }

    /// Sets the clock. If both KVMs know the wall-clock time, the clock advances by the time since
    /// it was saved, so the hosts' clocks should be synchronized. It never goes back: KVM adds
    /// nothing if the wall clock here is behind that of the source.
    ///
    /// # Errors
    /// Fails if KVM refuses, or if the clock is behind the saved one afterwards.
    pub fn load_clock(&self, vm: &VmFd) -> Result<ClockLoaded, StateError> {
        let Some(saved) = self.clock else { return Ok(ClockLoaded::none()) };
        let flags = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let set = kvm_clock_data {
            clock: saved.clock,
            flags: saved.flags & flags & KVM_CLOCK_REALTIME,
            realtime: saved.realtime,
            ..Default::default()
        };
        vm.set_clock(&set).map_err(ioctl_error("KVM_SET_CLOCK"))?;
        let here = vm.get_clock().map_err(ioctl_error("KVM_GET_CLOCK"))?;
        if here.clock < saved.clock {
            return Err(StateError::Unfit {
                what: format!("the VM's clock would go back from {} to {} ns", saved.clock, here.clock),
            });
        }
        Ok(ClockLoaded { source: Some(saved), here: Some(here) })
    }

    // PICs before the IOAPIC, because the IOAPIC may take over interrupts from them. The timer
    // last, because it starts to tick and raises its line at the chips.
    /// Loads interrupt controllers and timer into a VM that was built with `irqchip`. All vCPUs
    /// must be loaded, and none may run.
    ///
    /// # Errors
    /// Fails if the VM was built with another irqchip, or if KVM refuses.
    pub fn load_chips(&self, vm: &VmFd, irqchip: Irqchip) -> Result<(), StateError> {
        if irqchip != self.irqchip {
            let what = format!("the saved VM has {}, this one {}", self.irqchip.name(), irqchip.name());
            return Err(StateError::Unfit { what });
        }
        if let Some(chips) = &self.chips {
            for (id, data) in [
                (KVM_IRQCHIP_PIC_MASTER, &chips.pic_master),
                (KVM_IRQCHIP_PIC_SLAVE, &chips.pic_slave),
                (KVM_IRQCHIP_IOAPIC, &chips.ioapic),
            ] {
                sys::set_chip(vm, id, data).map_err(io_error("KVM_SET_IRQCHIP"))?;
            }
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(ioctl_error("KVM_SET_PIT2 (was the VM built with a PIT?)"))?;
        }
        Ok(())
    }

    /// Returns the encoding that is sent to the destination.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = ItemWriter::new();
        w.bytes(ITEM_IRQCHIP, &[self.irqchip as u8]);
        if let Some(chips) = &self.chips {
            w.bytes(ITEM_PIC_MASTER, &chips.pic_master);
            w.bytes(ITEM_PIC_SLAVE, &chips.pic_slave);
            w.bytes(ITEM_IOAPIC, &chips.ioapic);
        }
        if let Some(pit) = &self.pit {
            w.pod(ITEM_PIT, pit);
        }
        if let Some(clock) = &self.clock {
            w.pod(ITEM_CLOCK, clock);
        }
        w.with(ITEM_UNSUPPORTED, |w| {
            w.count(self.unsupported.len());
            self.unsupported.iter().for_each(|what| {
                w.text(what);
            });
        });
        w.finish()
    }

    /// Decodes what [`encode`](KvmState::encode) returned.
    ///
    /// # Errors
    /// Fails if a part is missing, unknown or present twice, or has a wrong size or an invalid
    /// value.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut items = Items::parse(bytes)?;
        let irqchip = items.take_with(ITEM_IRQCHIP, |r| Irqchip::from_u8(r.u8("irqchip")?))?;
        let irqchip = irqchip.ok_or(StateError::MissingItem { name: "kind of irqchip" })?;
        let mut chips = None;
        if irqchip == Irqchip::Full {
            let mut chip = |tag, name| {
                let chip = items.take_with(tag, |r| r.array::<CHIP_SIZE>(name))?;
                chip.ok_or(StateError::MissingItem { name })
            };
            chips = Some(Box::new(Chips {
                pic_master: chip(ITEM_PIC_MASTER, "master PIC")?,
                pic_slave: chip(ITEM_PIC_SLAVE, "slave PIC")?,
                ioapic: chip(ITEM_IOAPIC, "IOAPIC")?,
            }));
        }
        let pit = items.take_pod(ITEM_PIT, "PIT")?;
        if pit.is_some() && irqchip != Irqchip::Full {
            return Err(DecodeError::invalid("PIT", "there is none without a full irqchip").into());
        }
        let clock = items.take_pod(ITEM_CLOCK, "clock")?;
        let unsupported = items.take_with(ITEM_UNSUPPORTED, |r| {
            let count = r.count(MAX_UNSUPPORTED, "absent parts")?;
            (0..count).map(|_| r.text(MAX_UNSUPPORTED_NAME, "absent part")).collect::<Result<Vec<_>, _>>()
        })?;
        items.finish()?;
        Ok(Self { irqchip, chips, pit, clock, unsupported: unsupported.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsc_offset_follows_the_clock() {
        let clock =
            |clock, host_tsc| Some(kvm_clock_data { clock, host_tsc, flags: KVM_CLOCK_HOST_TSC, ..Default::default() });
        // at 2 GHz: 3 ms later by the VM's clock, on a host whose TSC is far behind
        let loaded = ClockLoaded { source: clock(1_000_000, 9_000_000_000), here: clock(4_000_000, 500) };
        let offset = loaded.tsc_offset(0u64.wrapping_sub(8_000_000_000), 2_000_000).unwrap();
        assert_eq!(offset.wrapping_add(500), 1_000_000_000 + 6_000_000);
        // on the same host at the same moment the offset stays the same
        let same = ClockLoaded { source: clock(7, 100), here: clock(7, 100) };
        assert_eq!(same.tsc_offset(42, 2_600_000), Some(42));
        // without the host's TSC the offset cannot be computed
        let blind = ClockLoaded { source: Some(kvm_clock_data::default()), here: clock(7, 100) };
        assert_eq!(blind.tsc_offset(42, 2_600_000), None);
        // extreme values do not overflow
        let far = ClockLoaded { source: clock(u64::MAX, u64::MAX), here: clock(0, 0) };
        assert!(far.tsc_offset(u64::MAX, u32::MAX).is_some());
    }
}
