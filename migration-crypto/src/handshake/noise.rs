//! The handshakes of the Noise protocol framework, from the crate `snow`.

use snow::{Builder, HandshakeState, params::NoiseParams};
use zeroize::Zeroizing;

use super::{Agreed, HandshakeError, MAX_MESSAGE, Wire, choose, preface::Preface};
use crate::{
    Suite,
    keys::{PublicKey, StaticKey},
    secret::{SECRET_LEN, Secret},
};

/// The Noise pattern for a pre-shared key. The source's first message is keyed already, so a peer
/// without the key is recognized at once. Both ephemeral keys enter the secret (forward secrecy).
const PSK: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";
/// The Noise pattern for static keys. Both sides know each other's public key beforehand.
const STATIC: &str = "Noise_KK_25519_ChaChaPoly_SHA256";
/// The largest number of cipher suites in an offer.
const MAX_OFFER: usize = 16;

/// The keys with which a side proves who it is.
pub(crate) enum NoiseKeys<'a> {
    Psk(&'a Secret),
    Static { own: &'a StaticKey, peer: &'a PublicKey },
}

impl NoiseKeys<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Psk(_) => "key",
            Self::Static { .. } => "static key, or the static key that it expects of this side,",
        }
    }

    fn start(&self, prologue: &[u8], initiator: bool) -> Result<HandshakeState, snow::Error> {
        let name = if matches!(self, Self::Psk(_)) { PSK } else { STATIC };
        let params: NoiseParams = name.parse()?;
        let builder = Builder::new(params).prologue(prologue)?;
        let builder = match self {
            Self::Psk(key) => builder.psk(0, key.bytes())?,
            Self::Static { own, peer } => builder.local_private_key(own.private.bytes())?.remote_public_key(&peer.0)?,
        };
        if initiator { builder.build_initiator() } else { builder.build_responder() }
    }
}

fn crypto(error: snow::Error) -> HandshakeError {
    HandshakeError::Crypto(error.into())
}

/// Runs the source's side of the handshake. `preface` needs no `message` yet; it is set here.
pub(crate) fn initiate(
    wire: &mut Wire<'_>,
    mut preface: Preface,
    keys: &NoiseKeys<'_>,
    offer: &[Suite],
) -> Result<Agreed, HandshakeError> {
    let mut payload = vec![offer.len() as u8];
    payload.extend(offer.iter().map(|suite| suite.code()));
    // the length is known beforehand: an ephemeral key, the payload and its tag
    preface.message = (32 + payload.len() + 16) as u16;
    let prologue = preface.encode();
    let mut noise = keys.start(&prologue, true).map_err(crypto)?;
    let mut message = [0; MAX_MESSAGE];
    let len = noise.write_message(&payload, &mut message).map_err(crypto)?;
    debug_assert_eq!(len, usize::from(preface.message));
    wire.write(&[&prologue, &message[..len]].concat())?;

    let answer = wire.read_answer()?;
    let mut payload = Zeroizing::new([0; MAX_MESSAGE]);
    let wrong = |_| HandshakeError::WrongKey(keys.name());
    let len = noise.read_message(&answer, &mut payload[..]).map_err(wrong)?;
    let (&code, secret) = payload[..len].split_first().ok_or(HandshakeError::Malformed("answer"))?;
    let suite = Suite::from_code(code).filter(|suite| offer.contains(suite)).ok_or(HandshakeError::Downgrade)?;
    if secret.len() != SECRET_LEN {
        return Err(HandshakeError::Malformed("answer"));
    }
    Ok(Agreed { suite, secret: Secret::extract(noise.get_handshake_hash(), secret) })
}

/// Runs the destination's side of the handshake, after the preface. Calls `on_authentic` once the
/// first message is known to be authentic.
pub(crate) fn respond(
    wire: &mut Wire<'_>,
    preface: &Preface,
    keys: &NoiseKeys<'_>,
    accepted: &[Suite],
    on_authentic: impl FnOnce() -> Result<(), HandshakeError>,
) -> Result<Agreed, HandshakeError> {
    let mut noise = keys.start(&preface.encode(), false).map_err(crypto)?;
    let mut message = vec![0; usize::from(preface.message)];
    wire.read(&mut message)?;
    let mut payload = [0; MAX_MESSAGE];
    let wrong = |_| HandshakeError::WrongKey(keys.name());
    let len = noise.read_message(&message, &mut payload).map_err(wrong)?;
    let (&count, codes) = payload[..len].split_first().ok_or(HandshakeError::Malformed("offer"))?;
    if usize::from(count) != codes.len() || codes.len() > MAX_OFFER {
        return Err(HandshakeError::Malformed("offer"));
    }
    // suites of later versions are unknown here and skipped
    let offer: Vec<Suite> = codes.iter().filter_map(|&code| Suite::from_code(code)).collect();
    let suite = choose(&offer, accepted)?;
    on_authentic()?;

    // Sent under both ephemeral keys, so that it stays secret even if all long-term keys become
    // known.
    let secret = Secret::random().map_err(|e| HandshakeError::Crypto(e.into()))?;
    let mut payload = Zeroizing::new([0; 1 + SECRET_LEN]);
    payload[0] = suite.code();
    payload[1..].copy_from_slice(secret.bytes());
    let mut message = [0; MAX_MESSAGE];
    let len = noise.write_message(&payload[..], &mut message).map_err(crypto)?;
    wire.answer(&message[..len])?;
    Ok(Agreed { suite, secret: Secret::extract(noise.get_handshake_hash(), secret.bytes()) })
}
