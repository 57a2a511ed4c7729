//! The options of the VMMs that are compared: the defaults, and those that a careful user chooses.
//!
//! The default options of a VMM say little about its abilities. QEMU, for example, stops the guest
//! as soon as the rest fits into its downtime limit, which is 300 ms by default. So pre-copy is
//! compared twice, each time with the same limit for both VMMs.

use serde::Serialize;

use super::encrypt::Cipher;

/// A set of options for all VMMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tuning {
    /// Every option has its default, except those of the mode that is measured.
    #[default]
    AsItComes,
    /// The options of a user who wants short pauses and has read the manual: a downtime limit of
    /// [`CAREFUL_LIMIT_MS`] for both VMMs. For QEMU also `auto-converge`, so that the migration of
    /// a busy guest ends, RAM that is populated at the destination before, and with TLS a
    /// `priority` without ChaCha20. Post-copy begins after a pass of pre-copy, for both VMMs.
    Careful,
}

/// The downtime limit that QEMU and minivmm have by default, in milliseconds.
pub(crate) const DEFAULT_LIMIT_MS: u64 = 300;
/// The downtime limit of a user who wants short pauses, in milliseconds.
const CAREFUL_LIMIT_MS: u64 = 20;

impl Tuning {
    pub(super) const ALL: [Self; 2] = [Self::AsItComes, Self::Careful];

    /// The longest downtime that the VMM may choose, in milliseconds.
    pub(super) fn downtime_limit_ms(self) -> u64 {
        match self {
            Self::AsItComes => DEFAULT_LIMIT_MS,
            Self::Careful => CAREFUL_LIMIT_MS,
        }
    }

    /// Returns whether QEMU slows down a guest whose migration does not end.
    pub(super) fn auto_converge(self) -> bool {
        self == Self::Careful
    }

    /// Returns whether QEMU's destination populates its RAM before the migration begins.
    pub(super) fn populates(self) -> bool {
        self == Self::Careful
    }

    /// Returns the cipher of encrypted runs, the same for all VMMs.
    ///
    /// With a pre-shared key, QEMU's TLS does not use AES by default: GnuTLS takes the key for one
    /// of SHA-256, for which TLS 1.3 has no AES-256, and prefers ChaCha20 to AES-128. A careful
    /// user chooses AES-128, which is many times as fast on a CPU with AES instructions.
    pub(super) fn cipher(self) -> Cipher {
        match self {
            Self::AsItComes => Cipher::Aes256,
            Self::Careful => Cipher::Aes128,
        }
    }

    /// Returns the label of the runs of a mode.
    pub(super) fn label(self, mode: &str) -> String {
        match self {
            Self::AsItComes => mode.to_owned(),
            Self::Careful => format!("{mode}-careful"),
        }
    }
}
