//! The preface: the first bytes of a secure channel.

use migration_core::wire::{LaneKind, MAGIC, SEALED_MAGIC};

use super::HandshakeError;

/// The version of the handshake and of the records that follow it.
pub(crate) const VERSION: u8 = 1;

/// The way in which a source proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    Psk,
    StaticKeys,
    Tls,
    /// By the secret of a session that the source has begun.
    Session,
}

impl Proof {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Psk => "a pre-shared key",
            Self::StaticKeys => "a static key",
            Self::Tls => "a TLS certificate",
            Self::Session => "a session",
        }
    }
}

/// The unencrypted bytes that a source sends first. The handshake covers all of them, so that a
/// change is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Preface {
    pub(crate) proof: Proof,
    pub(crate) kind: LaneKind,
    /// The number of the channel in its session; 0 for the first.
    pub(crate) counter: u32,
    /// The session of a further channel; zeros for the first channel. The identifier is not secret.
    pub(crate) session: [u8; 16],
    /// The length in bytes of the message that follows.
    pub(crate) message: u16,
}

impl Preface {
    /// The length in bytes, the same as that of a plain lane's preamble, so that each side can
    /// recognize the other form.
    pub(crate) const LEN: usize = migration_core::wire::Preamble::LEN;

    pub(crate) fn encode(&self) -> [u8; Self::LEN] {
        let proof = match self.proof {
            Proof::Psk => 1,
            Proof::StaticKeys => 2,
            Proof::Tls => 3,
            Proof::Session => 4,
        };
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&SEALED_MAGIC);
        bytes[8..11].copy_from_slice(&[VERSION, proof, self.kind.code()]);
        bytes[12..16].copy_from_slice(&self.counter.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.session);
        bytes[32..34].copy_from_slice(&self.message.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, HandshakeError> {
        if bytes[..8] == MAGIC {
            return Err(HandshakeError::PlainPeer);
        }
        if bytes[..8] != SEALED_MAGIC {
            return Err(HandshakeError::Unidentified);
        }
        if bytes[8] != VERSION {
            return Err(HandshakeError::Version(bytes[8]));
        }
        let proof = match bytes[9] {
            1 => Proof::Psk,
            2 => Proof::StaticKeys,
            3 => Proof::Tls,
            4 => Proof::Session,
            _ => return Err(HandshakeError::Malformed("proof")),
        };
        let kind = LaneKind::from_code(bytes[10]).ok_or(HandshakeError::Malformed("lane kind"))?;
        let counter = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[16..32]);
        let message = u16::from_le_bytes([bytes[32], bytes[33]]);
        let first = counter == 0 && session == [0; 16] && kind == LaneKind::Control;
        let fits = if proof == Proof::Session { counter != 0 && kind != LaneKind::Control } else { first };
        if !fits || bytes[11] != 0 || bytes[34..] != [0; 2] || usize::from(message) > super::MAX_MESSAGE {
            return Err(HandshakeError::Malformed("preface"));
        }
        Ok(Self { proof, kind, counter, session, message })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Each field has limits of its own, whatever the values of the other fields.
    #[test]
    fn fields_that_do_not_go_together_are_refused() {
        let message = super::super::MAX_MESSAGE as u16;
        let first = Preface { proof: Proof::Psk, kind: LaneKind::Control, counter: 0, session: [0; 16], message };
        let further = Preface { proof: Proof::Session, kind: LaneKind::Bulk, counter: 1, session: [7; 16], message: 1 };
        for good in [first, further, Preface { session: [0; 16], ..further }] {
            assert_eq!(Preface::decode(&good.encode()).unwrap(), good);
        }
        for bad in [
            Preface { kind: LaneKind::Bulk, ..first },
            Preface { counter: 1, ..first },
            Preface { session: [1; 16], ..first },
            Preface { message: message + 1, ..first },
            Preface { kind: LaneKind::Control, ..further },
            Preface { counter: 0, ..further },
        ] {
            let refused = Preface::decode(&bad.encode());
            assert!(matches!(refused, Err(HandshakeError::Malformed("preface"))), "{bad:?}: {refused:?}");
        }
        for reserved in [11, 34, 35] {
            let mut bytes = further.encode();
            bytes[reserved] = 1;
            assert!(matches!(Preface::decode(&bytes), Err(HandshakeError::Malformed("preface"))), "{reserved}");
        }
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(noise: [u8; 27], proof in 0u8..6, kind in 0u8..6, len in 0u16..2000) {
            let mut bytes = [0; Preface::LEN];
            bytes[..8].copy_from_slice(&SEALED_MAGIC);
            bytes[8..11].copy_from_slice(&[VERSION, proof, kind]);
            if proof == 4 {
                bytes[12..32].copy_from_slice(&noise[..20]);
            }
            bytes[32..34].copy_from_slice(&len.to_le_bytes());
            if let Ok(preface) = Preface::decode(&bytes) {
                prop_assert_eq!(preface.encode(), bytes);
            }
        }
    }
}
