//! Names of namespaces, and the record that a store keeps for each of them.

use std::{
    fmt,
    hash::{BuildHasher as _, RandomState},
};

use sha2::{Digest as _, Sha256};
use thiserror::Error;
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::{
    codec::{DecodeError, Reader, Writer},
    vm_id::VmId,
};

/// The prefix of the hash input for an id, so that no other hash of a name is an id.
const ID_LABEL: &[u8] = b"live migration, id of a namespace, version 1";

/// The secret name of a namespace: 16 random bytes that the writer of the namespace has generated.
///
/// A process that has the name may read the pages (rule 24): a wrapper that seals pages derives its
/// key from the name. The name is sent only inside a migration session. It has no `Display`, its
/// `Debug` form shows the id instead, and its bytes are overwritten when it is dropped.
///
/// ```
/// use migration_core::store::Namespace;
/// let name = Namespace::new([7; 16]); // in earnest: 16 bytes of the operating system's generator
/// assert_eq!(format!("{name:?}"), format!("Namespace(id {})", name.id()));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Namespace(Zeroizing<[u8; 16]>);

impl ZeroizeOnDrop for Namespace {}

impl Namespace {
    /// Returns the name with these 16 bytes, which must be as random as a key.
    /// `migration_crypto::random_namespace` gets them from the operating system.
    pub fn new(secret: [u8; 16]) -> Self {
        Self(Zeroizing::new(secret))
    }

    /// Returns the secret bytes, for the wire and for the derivation of keys. Do not log them.
    pub fn secret(&self) -> &[u8; 16] {
        &self.0
    }

    /// Returns the id under which stores know the namespace: the first 16 bytes of a SHA-256 hash.
    /// The name cannot be computed from the id.
    pub fn id(&self) -> NamespaceId {
        let hash = Sha256::new().chain_update(ID_LABEL).chain_update(self.secret()).finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&hash[..16]);
        NamespaceId(id)
    }

    /// Returns the reference to this namespace with which a process that has the VM `vm` calls a
    /// store.
    pub fn of(&self, vm: VmId) -> VmNamespace {
        VmNamespace { id: self.id(), vm }
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Namespace(id {})", self.id())
    }
}

/// The identity of a namespace in a store. It is derived from the [`Namespace`] and is not secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub [u8; 16]);

/// Writes 32 hexadecimal digits.
impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A reference to a namespace in a call of a store: its id, and the VM of the caller.
///
/// A store carries out a call only if the namespace's record names this VM (rule 24). A process
/// that has received a name from a peer takes the VM from the session's hello, and not from the
/// peer's message about the name. So a peer cannot make another process read, renew or forget the
/// pages of another VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VmNamespace {
    /// The id of the namespace.
    pub id: NamespaceId,
    /// The VM of the caller.
    pub vm: VmId,
}

/// A random value that a store keeps as long as it has lost nothing (rule 11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(pub [u8; 16]);

impl Incarnation {
    /// Returns an incarnation that no other store has, except by a collision of 128 bits. An
    /// incarnation is not secret, so the generator that seeds the hash maps of the standard library
    /// is used.
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

/// The party that is responsible for a namespace, as a text for a person who looks at an expired
/// namespace: for example the host and the process, and the epoch of the attempt.
///
/// No store and no peer compares the text (rule 8). It has 1 to 64 printable ASCII characters, so
/// that it can be shown on a terminal even if it comes from an untrusted process.
///
/// ```
/// use migration_core::store::Owner;
/// let owner = Owner::new("host-7, minivmm 4711, epoch 3")?;
/// assert_eq!(owner.to_string(), "host-7, minivmm 4711, epoch 3");
/// assert!(Owner::new("").is_err() && Owner::new("two\nlines").is_err());
/// # Ok::<(), migration_core::store::BadOwner>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    len: u8,
    /// The text, followed by zeros.
    text: [u8; Owner::MAX_BYTES],
}

/// The error that a text is not a valid [`Owner`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the owner of a namespace is 1 to 64 printable ASCII characters")]
pub struct BadOwner;

impl Owner {
    /// The largest number of characters.
    pub const MAX_BYTES: usize = 64;

    /// Returns the owner with this text.
    ///
    /// # Errors
    /// Returns [`BadOwner`] if the text is empty, is too long, or has characters other than
    /// printable ASCII.
    pub const fn new(text: &str) -> Result<Self, BadOwner> {
        let bytes = text.as_bytes();
        if bytes.is_empty() || bytes.len() > Self::MAX_BYTES {
            return Err(BadOwner);
        }
        let mut owner = Self { len: bytes.len() as u8, text: [0; Self::MAX_BYTES] };
        let mut at = 0;
        while at < bytes.len() {
            if !matches!(bytes[at], b' '..=b'~') {
                return Err(BadOwner);
            }
            owner.text[at] = bytes[at];
            at += 1;
        }
        Ok(owner)
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        // the text was ASCII when the owner was made
        self.text.get(..self.len.into()).and_then(|text| str::from_utf8(text).ok()).unwrap_or_default()
    }

    /// Decodes the form in which stores keep an owner. Returns `None` if the text is not valid.
    fn decode(len: u8, text: [u8; Self::MAX_BYTES]) -> Option<Self> {
        let owner = Self::new(str::from_utf8(text.get(..len.into())?).ok()?).ok()?;
        (owner.text == text).then_some(owner)
    }
}

/// Writes the text.
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Owner").field(&self.as_str()).finish()
    }
}

/// The purpose of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// Cold pages of a running VM.
    Home,
    /// A copy of a VM that is kept ready.
    Stage,
    /// Pages that one attempt to migrate puts into the store.
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

/// The record of a namespace: the VM to which it belongs, its purpose and its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// The VM to which the pages belong. A namespace is written, read, renewed or forgotten only by
    /// a process that has this VM (rule 24); the store compares the VMs.
    pub vm: VmId,
    /// The purpose of the namespace.
    pub purpose: Purpose,
    /// The party responsible for the namespace: its creator, and after a renewal the owner that the
    /// last renewal named.
    pub owner: Owner,
}

impl Record {
    /// The length of an encoded record in bytes.
    pub const BYTES: usize = 16 + 1 + 1 + Owner::MAX_BYTES;

    /// Returns the record in the form in which stores keep it.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut writer = Writer::new();
        writer.bytes(&self.vm.0).u8(self.purpose.code()).u8(self.owner.len).bytes(&self.owner.text);
        let mut bytes = [0; Self::BYTES];
        bytes.copy_from_slice(&writer.into_bytes());
        bytes
    }

    /// Decodes a record that [`encode`](Self::encode) encoded.
    ///
    /// # Errors
    /// Returns [`DecodeError`] if the bytes are not a valid record.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let vm = VmId(reader.array("VM")?);
        let purpose = Purpose::from_code(reader.u8("purpose")?)?;
        let len = reader.u8("length of the owner")?;
        let owner = Owner::decode(len, reader.array("owner")?)
            .ok_or_else(|| DecodeError::invalid("owner", "it is not printable ASCII of that length"))?;
        reader.finish()?;
        Ok(Self { vm, purpose, owner })
    }

    /// Returns whether `other` has the same VM and the same purpose. The owner may differ: a
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
            let record = Record { vm: VmId([3; 16]), purpose, owner: owner() };
            assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        }
        let good = Record { vm: VmId([3; 16]), purpose: Purpose::Home, owner: owner() }.encode();
        // bad purposes, bad lengths of the owner, a bad text, and bytes after its text
        for (at, bad) in [(16, 0), (16, 4), (16, 255), (17, 0), (17, 65), (17, 255), (18, 0x1b), (18, 0x80), (81, b'x')]
        {
            let mut bytes = good;
            bytes[at] = bad;
            assert!(Record::decode(&bytes).is_err(), "{bad} at {at}");
        }
    }

    fn owner() -> Owner {
        Owner::new("host-7, minivmm 4711").unwrap()
    }

    #[test]
    fn an_owner_is_printable() {
        let longest = "x".repeat(Owner::MAX_BYTES);
        assert_eq!(Owner::new(&longest).unwrap().as_str(), longest);
        for bad in ["", "tab\t", "\x1b[2J", "\u{e9}", "\x7f", &format!("{longest}x")] {
            assert_eq!(Owner::new(bad), Err(BadOwner), "{bad:?}");
        }
        assert_eq!(format!("{:?} {}", owner(), owner()), "Owner(\"host-7, minivmm 4711\") host-7, minivmm 4711");
    }

    #[test]
    fn incarnations_differ() {
        assert_ne!(Incarnation::random(), Incarnation::random());
    }
}
