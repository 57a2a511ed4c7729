//! Recorded streams of wire version 1, replayed against the receiver; and everything that can be
//! wrong with a stream.
//!
//! `streams/v1` holds, for each recording, the bytes that a source sent on its lanes (`control`,
//! `bulk-0`, `bulk-1`, in post-copy `demand-0`), the state that it saved (`state`) and checksums of
//! the RAM that the destination must have (`ram.txt`). `frames.txt` holds the encoding of every
//! kind of frame. They are part of the format: a change that makes these tests fail needs a new
//! version of the wire format. Only for a version that nobody has used yet may they be made anew:
//! `RECORD_STREAMS=1 cargo test -p migration-core --test wire_replay`.
//!
//! The token of a session is drawn by the destination, so it is put into the preambles of recorded
//! bulk lanes, whose checksum is then made right again. Likewise, an attempt after another one
//! needs a higher epoch in its control frames.

mod asked;
mod asks;
mod bounds;
mod callbacks;
mod channels;
mod cold_pages;
#[path = "../common/mod.rs"]
mod common;
mod crowded;
mod destination;
mod ended;
mod ephemeral;
mod fail_over;
mod golden;
mod guest;
mod held;
mod hostile;
mod kinds;
mod live;
mod observers;
mod one_attempt;
mod pager;
mod post_copy;
mod protected;
mod queue;
mod refusals;
mod restart;
mod rounds;
mod serving;
mod sessions;
mod several;
mod silence;
mod snapshots;
mod staging;
mod staging_faults;
mod steps;
mod store_failures;
mod streams;
mod switch;
mod through_stores;
mod tune;
mod verbs;
mod versions;

use std::time::Duration;

use migration_core::vm::VmId;

/// A test that waits longer than this has found a hang.
const HANG: Duration = Duration::from_secs(20);
const VM: VmId = VmId(*b"a recorded guest");
