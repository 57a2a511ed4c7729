//! The table of all kinds of frames. Encoders and decoders take their numbers from it, and tests
//! compare it with `docs/wire.md`, with the recorded frames and with the seeds of the fuzz targets.

/// The side that sends a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sender {
    /// Only the source.
    Source,
    /// Only the destination.
    Destination,
    /// Both sides.
    Both,
}

/// The lanes on which a frame is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lanes {
    /// Control and reattach lanes: a [`Control`](super::Control).
    Control,
    /// Bulk and demand lanes: a [`Bulk`](super::Bulk). Pages are sent on checkpoint lanes, too.
    Bulk,
    /// Checkpoint lanes: a [`Checkpoint`](super::Checkpoint).
    Checkpoint,
}

/// One kind of frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameKind {
    /// The number of the kind, in the first byte of the header.
    pub code: u8,
    /// The name of the kind, as in `docs/wire.md`.
    pub name: &'static str,
    /// The lanes on which the kind is sent.
    pub lanes: Lanes,
    /// The side that sends the kind.
    pub sender: Sender,
}

macro_rules! frame_kinds {
    ($($constant:ident = $code:literal, $name:literal, $lanes:ident, $sender:ident;)*) => {
        $(pub(super) const $constant: u8 = $code;)*

        /// All kinds of frames, by number.
        pub const FRAME_KINDS: &[FrameKind] = &[
            $(FrameKind { code: $code, name: $name, lanes: Lanes::$lanes, sender: Sender::$sender }),*
        ];
    };
}

frame_kinds! {
    HELLO = 0x01, "hello", Control, Source;
    WELCOME = 0x02, "welcome", Control, Destination;
    PREPARED = 0x03, "prepared", Control, Destination;
    ROUND_RECEIVED = 0x04, "round received", Control, Destination;
    PIECE = 0x05, "piece", Control, Source;
    STATE = 0x06, "state", Control, Source;
    OFFER = 0x07, "offer", Control, Source;
    READY = 0x08, "ready", Control, Destination;
    RUN = 0x09, "run", Control, Source;
    RUNNING = 0x0a, "running", Control, Destination;
    DONE = 0x0b, "done", Control, Source;
    ABANDON = 0x0c, "abandon", Control, Source;
    REATTACH = 0x0d, "reattach", Control, Source;
    ERROR = 0x0e, "error", Control, Both;
    PING = 0x0f, "ping", Control, Source;
    PONG = 0x10, "pong", Control, Destination;
    MISSING = 0x11, "missing", Control, Both;
    POST_COPY = 0x12, "post-copy", Control, Both;
    COMPLETE = 0x13, "complete", Control, Destination;
    STORE_TABLE = 0x14, "store table", Control, Source;
    STORE_TABLE_RECEIVED = 0x15, "store table received", Control, Destination;
    LOCATED = 0x16, "located", Control, Source;
    VACATED = 0x17, "vacated", Control, Source;
    RELEASED = 0x18, "released", Control, Destination;
    ENTRY_LOST = 0x19, "entry lost", Control, Both;
    PAGES = 0x40, "pages", Bulk, Both;
    ROUND_END = 0x41, "round end", Bulk, Both;
    REQUEST = 0x42, "request", Bulk, Destination;
    LANE_VACATED = 0x43, "vacated", Bulk, Source;
    CHECKPOINT_EVERY = 0x60, "every", Checkpoint, Source;
    CHECKPOINT_IDENTITY = 0x61, "identity", Checkpoint, Destination;
    CHECKPOINT_STATE = 0x62, "state", Checkpoint, Destination;
    CHECKPOINT_COMMIT = 0x63, "commit", Checkpoint, Destination;
    CHECKPOINT_COMMITTED = 0x64, "committed", Checkpoint, Source;
}

/// Returns the kind with the number `code`, or `None` if there is none.
pub fn frame_kind(code: u8) -> Option<&'static FrameKind> {
    let at = FRAME_KINDS.binary_search_by_key(&code, |kind| kind.code).ok()?;
    FRAME_KINDS.get(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_ascend_and_names_are_told_apart_by_their_lanes() {
        assert!(FRAME_KINDS.is_sorted_by(|a, b| a.code < b.code));
        for (n, kind) in FRAME_KINDS.iter().enumerate() {
            assert_eq!(frame_kind(kind.code), Some(kind));
            let same = |other: &FrameKind| (other.name, other.lanes) == (kind.name, kind.lanes);
            assert!(!FRAME_KINDS[..n].iter().any(same), "{kind:?}");
        }
        assert_eq!((0..=u8::MAX).filter_map(frame_kind).count(), FRAME_KINDS.len());
    }

    #[test]
    fn the_documentation_has_the_same_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/wire.md");
        let Ok(text) = std::fs::read_to_string(path) else {
            // a packaged crate does not include the documentation of the whole project
            return assert!(!std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../DESIGN.md")).exists());
        };
        let rows = text.lines().filter(|line| line.starts_with("| 0x")).map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            (cells.next().unwrap_or_default(), cells.next().unwrap_or_default(), cells.next().unwrap_or_default())
        });
        // a row about several kinds repeats what other tables have
        let mut documented: Vec<_> = rows.filter(|(code, ..)| !code.contains(',')).collect();
        documented.sort();
        let table: Vec<_> = FRAME_KINDS.iter().map(|kind| (format!("{:#04x}", kind.code), kind)).collect();
        assert_eq!(documented.len(), table.len(), "{documented:?}");
        for ((code, name, sender), (number, kind)) in documented.into_iter().zip(&table) {
            assert_eq!((code, name), (number.as_str(), kind.name));
            let senders: &[&str] = match kind.sender {
                Sender::Source => &["S"],
                Sender::Destination => &["D"],
                Sender::Both => &["both", "S, D"],
            };
            assert!(senders.contains(&sender), "{name}: from {sender}, not {:?}", kind.sender);
        }
    }
}
