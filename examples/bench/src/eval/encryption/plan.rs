//! The migrations that are measured, and their order.

use std::fmt;

use serde::Serialize;

use crate::bench::encrypt::Cipher;

/// The RAM of the guest in MiB, as in the paper.
const MEMORY: u64 = 1024;
/// The MiB on which a writer or reader works.
const SIZES: [u64; 3] = [64, 256, 768];
/// The MiB of data of the other guests.
const SIZE: u64 = 256;
/// The ciphers. TLS is not among them: it differs in the handshake only, and uses the same ciphers.
pub(super) const CIPHERS: [Cipher; 4] = [Cipher::None, Cipher::Aes128, Cipher::Aes256, Cipher::ChaCha20];
pub(super) const STRATEGIES: [&str; 3] = ["pre-copy", "post-copy", "hybrid"];
/// The seconds that a run takes in addition to its migration.
const AROUND: f64 = 4.5;

/// The kind of the guest's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Writer,
    Reader,
    Compute,
    /// None; a stream shares the migration's link.
    Stream,
}

/// A guest's work, with the MiB of data on which it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Work {
    pub(super) kind: Kind,
    pub(super) mib: u64,
}

impl Work {
    pub(super) fn all() -> Vec<Self> {
        let sized = |kind| SIZES.map(|mib| Self { kind, mib });
        let rest = [Kind::Compute, Kind::Stream].map(|kind| Self { kind, mib: SIZE });
        [&sized(Kind::Writer)[..], &sized(Kind::Reader), &rest].concat()
    }

    /// Returns the workload as minivmm expects it, with `unit` bytes for a MiB.
    pub(super) fn spec(self, unit: u64, seed: u32) -> String {
        let bytes = self.mib * unit;
        match self.kind {
            Kind::Writer => format!("random:size={bytes},seed={seed}"),
            Kind::Reader => format!("random:size={bytes},mode=read,seed={seed}"),
            Kind::Compute => format!("quicksort:size={bytes},seed={seed}"),
            Kind::Stream => format!("idle:data={bytes},seed={seed}"),
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Writer => write!(f, "writer-{}", self.mib),
            Kind::Reader => write!(f, "reader-{}", self.mib),
            Kind::Compute => f.write_str("compute"),
            Kind::Stream => f.write_str("stream"),
        }
    }
}

/// The link between the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Net {
    Unlimited,
    Gigabit,
}

impl Net {
    pub(super) const ALL: [Self; 2] = [Self::Unlimited, Self::Gigabit];
    pub(super) const GIGABIT_BITS: u64 = 1_000_000_000;
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Unlimited { "unlimited" } else { "1gbit" })
    }
}

/// The share of a core that each end has, including its vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Core {
    Full,
    Half,
}

impl Core {
    pub(super) const ALL: [Self; 2] = [Self::Full, Self::Half];

    pub(super) fn percent(self) -> u64 {
        if self == Self::Full { 100 } else { 50 }
    }
}

impl fmt::Display for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Full { "full" } else { "half" })
    }
}

/// A kind of migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cell {
    pub(super) cipher: Cipher,
    pub(super) strategy: &'static str,
    pub(super) work: Work,
    pub(super) net: Net,
    pub(super) core: Core,
}

/// The same as text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Names {
    pub(super) cipher: String,
    pub(super) strategy: String,
    pub(super) workload: String,
    pub(super) link: String,
    pub(super) core: String,
}

impl Names {
    /// Returns the fields in the order of a table's columns.
    pub(super) fn all(&self) -> [&str; 5] {
        [&self.cipher, &self.strategy, &self.workload, &self.link, &self.core]
    }
}

pub(super) fn cipher_name(cipher: Cipher) -> String {
    if cipher == Cipher::None { "none".into() } else { cipher.to_string() }
}

impl Cell {
    pub(super) fn names(&self) -> Names {
        Names {
            cipher: cipher_name(self.cipher),
            strategy: self.strategy.into(),
            workload: self.work.to_string(),
            link: self.net.to_string(),
            core: self.core.to_string(),
        }
    }

    /// Returns the bytes of guest RAM, with `unit` bytes for a MiB.
    pub(super) fn memory(&self, unit: u64) -> u64 {
        MEMORY * unit
    }

    /// Returns the approximate seconds of a run.
    pub(super) fn seconds(&self) -> f64 {
        let bits = (self.work.mib << 20) as f64 * 8.0;
        let rate = if self.net == Net::Gigabit { 0.9e9 } else { 8e9 };
        // a writer's pages are sent repeatedly, and a stream takes half of the link
        let again = match (self.work.kind, self.strategy) {
            (Kind::Writer, "pre-copy") => 4.0,
            (Kind::Writer, "hybrid") | (Kind::Stream, _) => 2.0,
            _ => 1.2,
        };
        let slow = if self.core == Core::Half { 1.5 } else { 1.0 };
        AROUND + again * slow * bits / rate
    }

    fn quick(&self) -> bool {
        self.cipher != Cipher::Aes128
            && self.work.mib == SIZE
            && self.work.kind != Kind::Stream
            && self.core == Core::Full
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().all().join(", "))
    }
}

/// Returns all kinds. Those that differ in the cipher only follow each other.
pub(super) fn cells(quick: bool) -> Vec<Cell> {
    let mut all = Vec::new();
    for core in Core::ALL {
        for net in Net::ALL {
            for work in Work::all() {
                for strategy in STRATEGIES {
                    all.extend(CIPHERS.map(|cipher| Cell { cipher, strategy, work, net, core }));
                }
            }
        }
    }
    all.retain(|cell| !quick || cell.quick());
    all
}

/// Returns whether a word names a property of a cell: `writer-64`, or `writer` for all sizes.
fn is(word: &str, name: &str) -> bool {
    let size = || name.strip_prefix(word)?.strip_prefix('-')?.parse::<u64>().ok();
    name == word || size().is_some()
}

/// Keeps the cells that match the words. If some words name ciphers, a cell must have one of them,
/// and likewise for the other properties.
pub(super) fn keep(cells: &mut Vec<Cell>, words: &[String]) -> Result<(), String> {
    let every: Vec<Names> = self::cells(false).iter().map(Cell::names).collect();
    let mut respects: [Vec<&str>; 5] = Default::default();
    for word in words {
        let of = |names: &Names| names.all().iter().position(|name| is(word, name));
        let Some(respect) = every.iter().find_map(of) else {
            let mut known: Vec<&str> = every.iter().flat_map(Names::all).collect();
            known.sort_unstable();
            known.dedup();
            return Err(format!("nothing is called `{word}`; there are: {}", known.join(", ")));
        };
        respects[respect].push(word);
    }
    cells.retain(|cell| {
        let names = cell.names();
        names.all().iter().zip(&respects).all(|(name, words)| words.is_empty() || words.iter().any(|w| is(w, name)))
    });
    if cells.is_empty() { Err("no migration is left to be measured".into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_there_once() {
        let (full, quick) = (cells(false), cells(true));
        assert_eq!(full.len(), 4 * 3 * 8 * 2 * 2);
        assert_eq!(quick.len(), 3 * 3 * 3 * 2);
        assert!(full.iter().enumerate().all(|(n, cell)| !full[..n].contains(cell)));
        assert!(quick.iter().all(|cell| full.contains(cell)));
        let minutes = quick.iter().map(Cell::seconds).sum::<f64>() / 60.0;
        assert!(minutes < 8.0, "{minutes}");
    }

    #[test]
    fn words_choose() {
        let kept = |words: &[&str]| {
            let mut cells = cells(false);
            keep(&mut cells, &words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>()).map(|()| cells.len())
        };
        assert_eq!(kept(&[]), Ok(384));
        assert_eq!(kept(&["writer"]), Ok(384 / 8 * 3));
        assert_eq!(kept(&["none", "aes256-gcm", "pre-copy", "writer-64", "1gbit", "full"]), Ok(2));
        assert!(kept(&["post"]).is_err() && kept(&["rot13"]).is_err_and(|why| why.contains("chacha20-poly1305")));
        let mut quick = cells(true);
        assert!(keep(&mut quick, &["stream".to_owned()]).is_err());
    }

    #[test]
    fn every_guest_is_one() {
        for work in Work::all() {
            guests::check_spec(&work.spec(1 << 20, 7)).unwrap();
            guests::check_spec(&work.spec(64 << 10, 7)).unwrap();
        }
    }
}
