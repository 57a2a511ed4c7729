//! Makes checksums and sequence numbers of mutated frames right again, so that mutations get behind
//! them.

use migration_core::wire::{Header, Preamble};

/// Repairs the checksum of a preamble.
pub fn preamble(bytes: &mut [u8]) {
    if let Some(preamble) = bytes.first_chunk_mut::<{ Preamble::LEN }>() {
        let crc = crc32fast::hash(&preamble[..32]);
        preamble[32..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Repairs the frames of a stream, as far as their lengths lead: sequence numbers from 0 and both
/// checksums.
pub fn stream(mut bytes: &mut [u8]) {
    for sequence in 0u32.. {
        let Some((header, rest)) = bytes.split_first_chunk_mut::<{ Header::LEN }>() else { return };
        header[8..12].copy_from_slice(&sequence.to_le_bytes());
        let length =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize;
        let (body, payload) = (length(16), length(20));
        if let Some(body) = rest.get(..body) {
            header[24..28].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        }
        let crc = crc32fast::hash(&header[..28]);
        header[28..].copy_from_slice(&crc.to_le_bytes());
        let Some(next) = rest.get_mut(body.saturating_add(payload)..) else { return };
        bytes = next;
    }
}
