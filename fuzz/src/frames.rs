//! Preambles, headers and frames.

use migration_core::wire::{Bulk, Checkpoint, Control, ErrorCode, Header, Preamble};

use crate::repair;

/// Pages of the VM that bulk frames are about.
const PAGES: u64 = 1 << 20;
/// Where a preamble has a byte that means nothing yet.
const RESERVED: usize = 13;

/// The first byte says what the rest is (preamble, control frame, bulk frame), and whether its
/// checksums are repaired.
pub fn check(input: &[u8]) {
    let Some((&what, rest)) = input.split_first() else { return };
    let mut bytes = rest.to_vec();
    let repaired = what & 4 != 0;
    if what & 3 == 0 {
        if repaired {
            repair::preamble(&mut bytes);
        }
        return preamble(&bytes);
    }
    if repaired {
        repair::stream(&mut bytes);
    }
    let Some((head, behind)) = bytes.split_first_chunk() else { return };
    let Ok(header) = Header::decode(head) else { return };
    assert_eq!(header.encode(), *head, "a header encodes to other bytes than it was decoded from");
    let Some(body) = behind.get(..header.body as usize) else { return };
    let frame = &bytes[..Header::LEN + body.len()];
    if what & 3 == 1 {
        control(&header, body, frame);
    } else if Checkpoint::is_kind(header.kind) {
        checkpoint(&header, body, frame);
    } else {
        bulk(&header, body, frame);
    }
}

fn preamble(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    if let Ok(preamble) = Preamble::decode(bytes) {
        let again = preamble.encode();
        if bytes[RESERVED] == 0 {
            assert_eq!(again, *bytes, "a preamble encodes to other bytes than it was decoded from");
        }
        assert_eq!(Preamble::decode(&again), Ok(preamble));
    }
}

fn control(header: &Header, body: &[u8], frame: &[u8]) {
    if let Ok(control) = Control::decode(header, body) {
        let again = control.encode(header.vm, header.sequence, header.number);
        // the codes of later versions all become `Other`
        if !matches!(control, Control::Error { code: ErrorCode::Other, .. }) {
            assert_eq!(again, frame, "{} encodes to other bytes than it was decoded from", control.name());
        }
    }
}

fn checkpoint(header: &Header, body: &[u8], frame: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::decode(header, body)
        && header.vm == 0
    {
        let again = checkpoint.encode(header.sequence, header.number);
        assert_eq!(again, frame, "a checkpoint frame encodes to other bytes than it was decoded from");
    }
}

fn bulk(header: &Header, body: &[u8], frame: &[u8]) {
    if let Ok(bulk) = Bulk::decode(header, body, PAGES) {
        assert_eq!(bulk.payload(), header.payload as usize);
        let again = bulk.encode(header.vm, header.sequence, header.number);
        assert_eq!(again, frame, "a bulk frame encodes to other bytes than it was decoded from");
        if let Bulk::Pages { extents, .. } = &bulk {
            assert!(extents.iter().all(|e| e.range.count > 0 && e.range.end() <= PAGES), "pages outside RAM");
        }
    }
}
