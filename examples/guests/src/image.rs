//! The guest's image, and the parameters that are written into it.

use crate::{
    WorkloadError, check_spec,
    layout::{MAX_CPUS, PAGE_SIZE, PARAMS_ADDRESS, PARAMS_MAGIC, params},
};

/// The compiled guest with an empty spec: it then takes `workload=…` from its command line.
pub const GUEST_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// Returns the guest's image for a spec and a number of CPUs.
///
/// `tsc_khz` is the frequency of the guest's clock in kHz; with 0 the guest measures it.
///
/// # Errors
/// When the spec is wrong, or the guest does not run on that number of CPUs.
pub fn elf(spec: &str, cpus: u32, tsc_khz: u64) -> Result<Vec<u8>, WorkloadError> {
    check_spec(spec)?;
    if cpus == 0 || cpus as usize > MAX_CPUS {
        return Err(WorkloadError::Cpus(cpus));
    }
    let mut image = GUEST_ELF.to_vec();
    let start = file_offset(&image, PARAMS_ADDRESS).ok_or(WorkloadError::Image)?;
    let page = image.get_mut(start..start + PAGE_SIZE as usize).ok_or(WorkloadError::Image)?;
    if word(page, params::MAGIC) != PARAMS_MAGIC {
        return Err(WorkloadError::Image);
    }
    // `check_spec` bounds the length, so the spec stays within the page.
    page[params::CPUS..][..4].copy_from_slice(&cpus.to_le_bytes());
    page[params::TSC_KHZ..][..8].copy_from_slice(&tsc_khz.to_le_bytes());
    page[params::SPEC_LENGTH..][..4].copy_from_slice(&(spec.len() as u32).to_le_bytes());
    page[params::SPEC..][..spec.len()].copy_from_slice(spec.as_bytes());
    Ok(image)
}

/// Returns the program headers of an ELF64 file's loaded segments.
fn segments(image: &[u8]) -> impl Iterator<Item = &[u8]> {
    const PROGRAM_HEADERS: usize = 32;
    const HEADER_COUNT: usize = 56;
    const HEADER_SIZE: usize = 56;
    const PT_LOAD: u32 = 1;
    let first = word_checked(image, PROGRAM_HEADERS).unwrap_or(u64::MAX) as usize;
    let count = image.get(HEADER_COUNT..HEADER_COUNT + 2).map_or(0, |n| u16::from_le_bytes([n[0], n[1]]));
    let headers = (0..usize::from(count))
        .filter_map(move |n| image.get(first.checked_add(n * HEADER_SIZE)?..)?.get(..HEADER_SIZE));
    headers.filter(|header| word(header, 0) as u32 == PT_LOAD)
}

/// Returns the offset in an ELF64 file of the byte that is loaded to a physical address.
fn file_offset(image: &[u8], address: u64) -> Option<usize> {
    segments(image).find_map(|header| {
        let (offset, start, size) = (word(header, 8), word(header, 24), word(header, 32));
        let inside = address >= start && address - start < size;
        inside.then_some((offset + address - start) as usize)
    })
}

/// Returns the physical address at which the memory of an ELF64 file ends.
pub(crate) fn loaded_end(image: &[u8]) -> u64 {
    segments(image).map(|header| word(header, 24).saturating_add(word(header, 40))).max().unwrap_or(0)
}

fn word_checked(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Returns a word of a page or header that is long enough for it.
pub(crate) fn word(bytes: &[u8], at: usize) -> u64 {
    word_checked(bytes, at).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Board, State, layout};

    #[test]
    fn the_image_carries_the_spec() {
        let image = elf("hot:size=64M,data=700M", 4, 2_600_000).unwrap();
        assert_eq!(image.len(), GUEST_ELF.len());
        assert!(image.len() < 200 << 10);
        let page = &image[file_offset(&image, PARAMS_ADDRESS).unwrap()..];
        assert_eq!(word(page, params::CPUS) as u32, 4);
        assert_eq!(word(page, params::TSC_KHZ), 2_600_000);
        assert_eq!(word(page, params::SPEC_LENGTH) as u32, 22);
        assert_eq!(&page[params::SPEC..][..22], b"hot:size=64M,data=700M");
        let board: &[u8; 4096] =
            image[file_offset(&image, layout::BOARD_ADDRESS).unwrap()..][..4096].try_into().unwrap();
        let board = Board::parse(board).unwrap();
        assert_eq!((board.state, board.cpus_online, board.heartbeats, board.first_error), (State::Booting, 0, 0, None));
    }

    #[test]
    fn the_guest_runs_on_one_to_sixteen_cpus() {
        assert_eq!(elf("idle", 0, 0), Err(WorkloadError::Cpus(0)));
        assert_eq!(elf("idle", 17, 0), Err(WorkloadError::Cpus(17)));
        assert!(elf("idle", 16, 0).is_ok());
    }
}
