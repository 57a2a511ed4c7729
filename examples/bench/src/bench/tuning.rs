//! How the VMMs that are compared are set up: as they come, and as a careful user sets them up.
//!
//! A default says more about its authors' caution than about what a VMM can do. QEMU, for one,
//! stops the guest as soon as the rest fits into its downtime limit, and that is 300 ms unless
//! somebody sets it. So pre-copy is compared twice, each time with the same limit for both.

use serde::Serialize;

use super::encrypt::Cipher;

/// A set of options for all VMMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tuning {
    /// Every option at its default, but for those that the mode itself is about.
    #[default]
    AsItComes,
    /// What a user sets who wants short pauses, and has read the manual: a downtime limit of
    /// [`CAREFUL_LIMIT_MS`] for both. For QEMU also `auto-converge`, so that the migration of a
    /// busy guest ends; RAM that the destination has populated before; with TLS, a `priority` that
    /// leaves ChaCha20 out. Post-copy begins after a pass of pre-copy, for both.
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

    /// Whether QEMU slows a guest down whose migration does not end.
    pub(super) fn auto_converge(self) -> bool {
        self == Self::Careful
    }

    /// Whether QEMU's destination populates its RAM before the migration begins.
    pub(super) fn populates(self) -> bool {
        self == Self::Careful
    }

    /// The cipher of encrypted runs, the same for all VMMs.
    ///
    /// By itself QEMU's TLS does not use AES with a pre-shared key: GnuTLS takes the key for one of
    /// SHA-256, for which TLS 1.3 has no AES-256, and prefers ChaCha20 to AES-128. A careful user
    /// asks for the latter, many times as fast on a CPU with AES.
    pub(super) fn cipher(self) -> Cipher {
        match self {
            Self::AsItComes => Cipher::Aes256,
            Self::Careful => Cipher::Aes128,
        }
    }

    /// The label of the runs of a mode.
    pub(super) fn label(self, mode: &str) -> String {
        match self {
            Self::AsItComes => mode.to_owned(),
            Self::Careful => format!("{mode}-careful"),
        }
    }
}
