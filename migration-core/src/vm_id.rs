//! The identity of a VM: [`vm::VmId`](crate::vm::VmId). It is beside `vm`, because stores and paged
//! memory go by it, and `vm` names paged memory.

use std::fmt;

/// The identity of a VM: 16 bytes that no other VM has, such as a UUID. It stays the same on every
/// host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct VmId(pub [u8; 16]);

/// Writes 32 hexadecimal digits.
impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}
