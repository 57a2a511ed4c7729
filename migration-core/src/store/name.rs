//! Names of namespaces, and what a store records about each of them.

use std::{
    fmt,
    hash::{BuildHasher as _, RandomState},
};

use sha2::{Digest as _, Sha256};

use crate::{
    codec::{DecodeError, Reader, Writer},
    vm::VmId,
};

/// What the derivation of an id begins with, so that no other hash of a name is an id.
const ID_LABEL: &[u8] = b"live migration, id of a namespace, version 1";

/// The secret name of a namespace: 16 random bytes that its writer has made.
///
/// Whoever has the name may read the pages (rule 24): a wrapper that seals pages derives its key
/// from the name. The name travels only inside a migration session. It has no `Display`, and its
/// `Debug` form shows the id instead.
///
/// ```
/// use migration_core::store::Namespace;
/// let name = Namespace::new([7; 16]); // in earnest: 16 bytes of the operating system's generator
/// assert_eq!(format!("{name:?}"), format!("Namespace(id {})", name.id()));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Namespace([u8; 16]);

impl Namespace {
    /// Makes a name of 16 bytes, which must be as random as a key.
    /// `migration_crypto::random_namespace` takes them from the operating system.
    pub fn new(secret: [u8; 16]) -> Self {
        Self(secret)
    }

    /// Returns the secret bytes, for the wire and for the derivation of keys. Do not log them.
    pub fn secret(&self) -> &[u8; 16] {
        &self.0
    }

    /// Returns the id under which stores know the namespace: the first 16 bytes of a SHA-256. The
    /// name cannot be computed from it.
    pub fn id(&self) -> NamespaceId {
        let hash = Sha256::new().chain_update(ID_LABEL).chain_update(self.0).finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&hash[..16]);
        NamespaceId(id)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Namespace(id {})", self.id())
    }
}

/// Identifies a namespace towards a store. It is derived from the [`Namespace`] and is no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub [u8; 16]);

/// Writes 32 hexadecimal digits.
impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A random value that a store keeps for as long as it has lost nothing (rule 11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(pub [u8; 16]);

impl Incarnation {
    /// Returns an incarnation that no other store has, but for a collision of 128 bits. An
    /// incarnation is no secret: the generator is the one that seeds the hash maps of the standard
    /// library.
    pub fn random() -> Self {
        let half = || RandomState::new().hash_one(ID_LABEL).to_le_bytes();
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&half());
        bytes[8..].copy_from_slice(&half());
        Self(bytes)
    }
}

/// Writes 32 hexadecimal digits.
impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Identifies the process that answers for a namespace: 16 bytes that no other process has. A store
/// does not check it (rule 8); it is recorded so that a person can see whose an expired namespace
/// was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(pub [u8; 16]);

/// Writes 32 hexadecimal digits.
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What a namespace is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// Cold pages of a running VM.
    Home,
    /// A copy of a VM that is kept ready.
    Stage,
    /// What one attempt to migrate puts into the store.
    Attempt,
}

impl Purpose {
    fn code(self) -> u8 {
        match self {
            Self::Home => 1,
            Self::Stage => 2,
            Self::Attempt => 3,
        }
    }

    fn from_code(code: u8) -> Result<Self, DecodeError> {
        match code {
            1 => Ok(Self::Home),
            2 => Ok(Self::Stage),
            3 => Ok(Self::Attempt),
            _ => Err(DecodeError::invalid("purpose", format!("{code} is no purpose of a namespace"))),
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Home => "home",
            Self::Stage => "stage",
            Self::Attempt => "attempt",
        })
    }
}

/// Whose a namespace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// The VM whose pages it has. A namespace is read, renewed or forgotten only by whoever has
    /// this VM (rule 24); the caller compares.
    pub vm: VmId,
    /// What it is for.
    pub purpose: Purpose,
    /// Who answers for it: its maker, and from the first renewal on whoever renewed it last.
    pub owner: Owner,
}

impl Record {
    /// Length in bytes of an encoded record.
    pub const BYTES: usize = 33;

    /// Returns the record in the form in which stores keep it.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut writer = Writer::new();
        writer.bytes(&self.vm.0).u8(self.purpose.code()).bytes(&self.owner.0);
        let mut bytes = [0; Self::BYTES];
        bytes.copy_from_slice(&writer.into_bytes());
        bytes
    }

    /// Reads a record that [`encode`](Self::encode) made.
    ///
    /// # Errors
    /// Returns [`DecodeError`] if the bytes are no record.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let vm = VmId(reader.array("VM")?);
        let purpose = Purpose::from_code(reader.u8("purpose")?)?;
        let owner = Owner(reader.array("owner")?);
        reader.finish()?;
        Ok(Self { vm, purpose, owner })
    }

    /// Returns whether `other` is of the same VM and for the same purpose. The owner may differ: a
    /// repeated `create` can arrive after a renewal by the next owner.
    pub fn same_namespace(&self, other: &Self) -> bool {
        self.vm == other.vm && self.purpose == other.purpose
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_never_printed() {
        let name = Namespace::new(*b"0123456789abcdef");
        let shown = format!("{name:?} {name:#?}");
        assert!(!shown.contains("30313233") && !shown.contains("48, 49") && !shown.contains("0123456789ab"), "{shown}");
        assert!(shown.contains(&name.id().to_string()));
    }

    #[test]
    fn ids_differ_as_names_do() {
        let [a, b] = [1, 2].map(|byte| Namespace::new([byte; 16]));
        assert_eq!(a.id(), a.clone().id());
        assert_ne!(a.id(), b.id());
        assert_ne!(a.id().0, *a.secret());
        // the derivation is a part of the format of every store: it must never change
        assert_eq!(a.id().to_string(), "bb4ffad9da15e7c771077ac505bc2511");
    }

    #[test]
    fn records_come_back_as_they_were() {
        for purpose in [Purpose::Home, Purpose::Stage, Purpose::Attempt] {
            let record = Record { vm: VmId([3; 16]), purpose, owner: Owner([9; 16]) };
            assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        }
        let mut bytes = Record { vm: VmId([3; 16]), purpose: Purpose::Home, owner: Owner([9; 16]) }.encode();
        for bad in [0, 4, 255] {
            bytes[16] = bad;
            assert!(Record::decode(&bytes).is_err(), "{bad}");
        }
    }

    #[test]
    fn incarnations_differ() {
        assert_ne!(Incarnation::random(), Incarnation::random());
    }
}
