//! Checks the wire's limits on state and configuration at the sender. A check comes before the
//! guest is paused where that is possible, and its error names the item that is too large.

use crate::{
    MigrationError,
    state::{MAX_SECTION, MAX_SECTION_NAME, MAX_SECTIONS, MAX_STATE, Section, VmState},
    vm::{StateEstimate, VmDescription, VmError},
    wire::{MAX_CONFIG, MAX_DEVICES, STATE_CHUNK},
};

/// The approximate number of bytes that a section takes in addition to its data.
const SECTION_HEAD: u64 = 24;
/// The advice for a section that is too large.
const IN_PIECES: &str = "its device has to send it in pieces while the guest runs (Device::iterate)";

fn too_large(what: &str, bytes: u64, limit: usize, advice: &str) -> String {
    format!("{what} has {bytes} bytes, more than the {limit} that a migration carries: {advice}")
}

fn name_too_long(section: &Section) -> String {
    format!("the name of section {:?} has more than {MAX_SECTION_NAME} bytes", section.name)
}

/// Checks a description before it is sent.
///
/// # Errors
/// Returns [`MigrationError::Blocked`], with the field that the destination would refuse.
pub(super) fn check_description(vm: &VmDescription) -> Result<(), MigrationError> {
    let blocked = |why| Err(MigrationError::Blocked(why));
    let advice = "the VMM has to describe the machine in less, or send the rest as device state";
    for (what, blob) in [("the VM's configuration", &vm.config), ("the VM's list of host needs", &vm.host_needs)] {
        if blob.len() > MAX_CONFIG {
            return blocked(too_large(what, blob.len() as u64, MAX_CONFIG, advice));
        }
    }
    if vm.devices.len() > MAX_DEVICES {
        let count = vm.devices.len();
        return blocked(format!("the VM has {count} devices, more than the {MAX_DEVICES} that a migration carries"));
    }
    match vm.devices.iter().find(|device| device.name.len() > MAX_SECTION_NAME) {
        Some(device) => blocked(format!("the name of device {:?} has more than {MAX_SECTION_NAME} bytes", device.name)),
        None => Ok(()),
    }
}

/// Checks the VMM's estimate of the state that is saved in the pause, together with the pieces that
/// are still pending.
///
/// # Errors
/// Returns [`MigrationError::Blocked`], with the section that is too large.
pub(super) fn check_estimate(estimate: &StateEstimate, pending: u64) -> Result<(), MigrationError> {
    let blocked = |why| Err(MigrationError::Blocked(why));
    if let Some(section) = estimate.sections.iter().find(|section| section.bytes > MAX_SECTION as u64) {
        let what = format!("the state of {} {}", section.name, section.instance);
        return blocked(too_large(&what, section.bytes, MAX_SECTION, IN_PIECES));
    }
    let heads = estimate.sections.len() as u64 * SECTION_HEAD;
    let bytes = estimate.bytes().saturating_add(pending).saturating_add(heads);
    if bytes > MAX_STATE as u64 {
        let largest = estimate.sections.iter().max_by_key(|section| section.bytes);
        let largest =
            largest.map_or(String::new(), |s| format!(", of which {} {} has {}", s.name, s.instance, s.bytes));
        let what = format!("the VM's state ({pending} bytes of it pending pieces{largest})");
        return blocked(too_large(&what, bytes, MAX_STATE, "more of it has to move in pieces while the guest runs"));
    }
    Ok(())
}

/// Checks a state that was saved, before any of it is sent.
///
/// # Errors
/// Returns an error that names the section. The VMM's estimate did not include it, so the guest is
/// paused by then, and is resumed.
pub(super) fn check_state(state: &VmState) -> Result<(), MigrationError> {
    let failed = |why| Err(MigrationError::vm("saving the state")(VmError::new(why)));
    for section in &state.sections {
        if section.data.len() > MAX_SECTION {
            let what = format!("section {} {}", section.name, section.instance);
            return failed(too_large(&what, section.data.len() as u64, MAX_SECTION, IN_PIECES));
        }
        if section.name.len() > MAX_SECTION_NAME {
            return failed(name_too_long(section));
        }
    }
    if state.sections.len() > MAX_SECTIONS {
        let count = state.sections.len();
        return failed(format!(
            "the state has {count} sections, more than the {MAX_SECTIONS} that a migration carries"
        ));
    }
    // The size of the encoded state.
    let bytes = 4 + state.bytes() + state.sections.iter().map(|s| s.name.len() + 16).sum::<usize>();
    if bytes > MAX_STATE {
        let advice = "more of it has to move in pieces while the guest runs";
        return failed(too_large("the VM's state", bytes as u64, MAX_STATE, advice));
    }
    Ok(())
}

/// Checks a piece of device state before it is sent.
///
/// # Errors
/// Returns an error that names the device.
pub(super) fn check_piece(piece: &Section) -> Result<(), MigrationError> {
    let failed = |why| Err(MigrationError::vm("saving a piece of device state")(VmError::new(why)));
    if piece.name.len() > MAX_SECTION_NAME {
        return failed(name_too_long(piece));
    }
    if piece.data.len() > STATE_CHUNK {
        let what = format!("a piece of the state of {} {}", piece.name, piece.instance);
        let advice = "smaller pieces are asked for by their budget";
        return failed(too_large(&what, piece.data.len() as u64, STATE_CHUNK, advice));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        RamLayout, RamRegion,
        device::DeviceKind,
        vm::{SectionEstimate, VmId},
    };

    fn section(name: &str, bytes: usize) -> Section {
        Section { name: name.into(), instance: 3, version: 1, data: Bytes::from(vec![0; bytes]) }
    }

    fn says(result: Result<(), MigrationError>, words: &[&str]) {
        let said = crate::text::describe(result.unwrap_err());
        words.iter().for_each(|word| assert!(said.contains(word), "{said} does not say {word}"));
    }

    #[test]
    fn a_description_that_no_destination_takes_is_refused_by_its_sender() {
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 1 << 20 }]).unwrap();
        let blob = |len| Bytes::from(vec![0; len]);
        let device = |name: String| DeviceKind { name, instance: 0, oldest: 1, version: 1 };
        let (host_needs, config) = (blob(MAX_CONFIG), blob(MAX_CONFIG));
        let devices = vec![device("d".repeat(MAX_SECTION_NAME)); MAX_DEVICES];
        let good = VmDescription { id: VmId([1; 16]), layout, devices, host_needs, config };
        check_description(&good).unwrap();
        let bad = VmDescription { config: blob(MAX_CONFIG + 1), ..good.clone() };
        says(check_description(&bad), &["configuration", "262145", "262144"]);
        let bad = VmDescription { host_needs: blob(MAX_CONFIG + 1), ..good.clone() };
        says(check_description(&bad), &["host needs", "262145"]);
        let bad = VmDescription { devices: vec![device("d".into()); MAX_DEVICES + 1], ..good.clone() };
        says(check_description(&bad), &["1025 devices"]);
        let bad = VmDescription { devices: vec![device("d".repeat(65))], ..good };
        says(check_description(&bad), &["ddd", "64 bytes"]);
    }

    #[test]
    fn a_section_that_is_too_large_is_named_before_the_pause_and_in_it() {
        let estimate = |bytes: &[u64]| StateEstimate {
            sections: bytes.iter().map(|&bytes| SectionEstimate { name: "gpu".into(), instance: 3, bytes }).collect(),
            save_time: None,
        };
        let most = MAX_SECTION as u64;
        check_estimate(&estimate(&[most; 3]), most - 3 * SECTION_HEAD).unwrap();
        says(check_estimate(&estimate(&[most; 3]), most - 3 * SECTION_HEAD + 1), &["67108865", "67108864"]);
        says(check_estimate(&estimate(&[5, most + 1]), 0), &["gpu 3", "16777217", "16777216", "pieces"]);
        says(check_estimate(&estimate(&[most; 4]), 1), &["gpu 3", "67108961", "1 bytes of it pending"]);
        says(check_estimate(&StateEstimate::default(), u64::MAX), &["pending"]);

        let state = |sections| VmState { sections };
        check_state(&state(vec![section("gpu", MAX_SECTION)])).unwrap();
        says(check_state(&state(vec![section("gpu", MAX_SECTION + 1)])), &["section gpu 3", "16777217", "pieces"]);
        says(check_state(&state(vec![section(&"n".repeat(65), 1)])), &["nnn"]);
        says(check_state(&state(vec![section("gpu", MAX_SECTION); 4])), &["the VM's state", "67108864"]);
        says(check_state(&state(vec![section("n", 0); MAX_SECTIONS + 1])), &["8193 sections"]);

        // As much as the destination accepts, in the encoded size.
        check_state(&state(vec![section(&"n".repeat(MAX_SECTION_NAME), 1); MAX_SECTIONS])).unwrap();
        let mut most = state(vec![section("gpu", MAX_SECTION); 3]);
        most.sections.push(section("network", 0));
        let left = MAX_STATE - most.encode().len();
        most.sections[3].data = Bytes::from(vec![0; left]);
        assert_eq!(most.encode().len(), MAX_STATE);
        check_state(&most).unwrap();
        most.sections[3].data = Bytes::from(vec![0; left + 1]);
        says(check_state(&most), &["67108865", "67108864"]);

        check_piece(&section(&"n".repeat(MAX_SECTION_NAME), STATE_CHUNK)).unwrap();
        says(check_piece(&section(&"n".repeat(MAX_SECTION_NAME + 1), 1)), &["nnn", "64 bytes"]);
        says(check_piece(&section("gpu", STATE_CHUNK + 1)), &["gpu 3", "1048577"]);
    }
}
