//! TLS 1.3 with certificates on both sides, from the crate `rustls`. TLS does the handshake only.
//! Its exporter (RFC 8446, 7.5) provides the secret for our records.

use std::{error::Error, fmt, io::Read, path::Path, sync::Arc};

use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, RootCertStore, ServerConfig, ServerConnection,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use zeroize::Zeroizing;

use super::{Agreed, HandshakeError, Wire, choose, preface::Preface};
use crate::{
    Suite,
    keys::{KeyError, open_private, open_public},
    secret::{SECRET_LEN, Secret},
};

/// The length in bytes of the largest TLS record: 2¹⁴ bytes and 256 of expansion (RFC 8446, 5.2).
pub(crate) const MAX_RECORD: usize = (1 << 14) + 256;
/// The largest number of handshake bytes that a peer may send before it is authenticated: some
/// certificates of some KiB each.
const MAX_FLIGHT: usize = 128 << 10;
const EXPORTER: &[u8] = b"EXPORTER-live-migration";
/// The byte that the destination sends once it has checked the source's certificate.
const ACCEPTED: u8 = 1;
/// The largest size in bytes of a file with certificates or a key.
const MAX_PEM: u64 = 1 << 20;

/// A side's X.509 identity: its own certificate and key, the authorities that it trusts, and the
/// name of the peer that it expects.
#[derive(Clone)]
pub struct TlsIdentity {
    roots: Arc<RootCertStore>,
    /// The certificate chain and its private key, parsed once, so that handshakes leave no copies
    /// of the key.
    own: Arc<SingleCertAndKey>,
    peer: ServerName<'static>,
}

impl TlsIdentity {
    /// Reads an identity from the folder `dir`. The file `ca.pem` has the certificates of the
    /// authorities that may issue the peer's certificate, `cert.pem` this side's certificate
    /// followed by intermediate ones, and `key.pem` its private key. A source demands that the
    /// destination's certificate is for `peer_name`, a host name or an IP address. A destination
    /// accepts every source whose certificate one of the authorities issued.
    ///
    /// # Errors
    /// Fails if a file is missing or invalid, if `peer_name` is no valid name, or if others can
    /// read the key.
    pub fn load(dir: &Path, peer_name: &str) -> Result<Self, KeyError> {
        let file = |name: &str| dir.join(name);
        let bad = |name: &str, cause: Box<dyn Error + Send + Sync>| KeyError::Certificate { path: file(name), cause };
        let certificates = |name: &str| {
            let pem = read(&file(name), false)?;
            let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
            let list = list.map_err(|e| bad(name, e.into()))?;
            if list.is_empty() { Err(bad(name, "the file holds no certificate".into())) } else { Ok(list) }
        };
        let mut roots = RootCertStore::empty();
        for root in certificates("ca.pem")? {
            roots.add(root).map_err(|e| bad("ca.pem", e.into()))?;
        }
        let key =
            PrivateKeyDer::from_pem_slice(&read(&file("key.pem"), true)?).map_err(|e| bad("key.pem", e.into()))?;
        let peer = ServerName::try_from(peer_name.to_owned())
            .map_err(|_| bad("", format!("{peer_name:?} is not a valid name for a certificate").into()))?;
        let own = CertifiedKey::from_der(certificates("cert.pem")?, key, &provider());
        let own = own.map_err(|e| bad("cert.pem", format!("together with key.pem: {e}").into()))?;
        let this = Self { roots: Arc::new(roots), own: Arc::new(SingleCertAndKey::from(own)), peer };
        // build both configurations now, so that errors are reported before the first peer comes
        this.client(&[]).and_then(|_| this.server(&[])).map_err(|e| bad("", e.into()))?;
        Ok(this)
    }

    fn client(&self, suites: &[Suite]) -> Result<ClientConfig, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_cert_resolver(self.own.clone());
        config.resumption = Resumption::disabled();
        config.alpn_protocols = protocols(suites);
        Ok(config)
    }

    fn server(&self, suites: &[Suite]) -> Result<ServerConfig, rustls::Error> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), provider())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.own.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = protocols(suites);
        Ok(config)
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity").field("peer", &self.peer).finish_non_exhaustive()
    }
}

fn read(path: &Path, private: bool) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let failed = |cause| KeyError::File { path: path.to_owned(), cause };
    let file = if private { open_private(path)? } else { open_public(path)? };
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(MAX_PEM).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Returns the cipher suites of our records as names of application protocols (ALPN). TLS
/// authenticates the negotiation of these, so nobody can change the offer unnoticed.
fn protocols(suites: &[Suite]) -> Vec<Vec<u8>> {
    suites.iter().map(|suite| format!("live-migration/{suite}").into_bytes()).collect()
}

fn tls(error: impl Into<Box<dyn Error + Send + Sync>>) -> HandshakeError {
    HandshakeError::Tls(error.into())
}

/// Runs the source's side of the handshake.
pub(crate) fn initiate(
    wire: &mut Wire<'_>,
    preface: &Preface,
    identity: &TlsIdentity,
    offer: &[Suite],
) -> Result<Agreed, HandshakeError> {
    let prologue = preface.encode();
    wire.write(&prologue)?;
    // a plain destination answers in another protocol, so wait for the answer before TLS begins
    wire.read_answer()?;
    let config = Arc::new(identity.client(offer).map_err(tls)?);
    let mut connection = ClientConnection::new(config, identity.peer.clone()).map_err(tls)?;
    run(wire, &mut connection)?;
    let mut word = [0];
    while connection.reader().read(&mut word).unwrap_or(0) == 0 {
        receive(wire, &mut connection)?;
    }
    if word != [ACCEPTED] {
        return Err(HandshakeError::Malformed("answer"));
    }
    agreed(&connection, &prologue, offer)
}

/// Runs the destination's side of the handshake, after the preface.
pub(crate) fn respond(
    wire: &mut Wire<'_>,
    preface: &Preface,
    identity: &TlsIdentity,
    accepted: &[Suite],
) -> Result<Agreed, HandshakeError> {
    wire.answer(&[])?;
    let config = Arc::new(identity.server(accepted).map_err(tls)?);
    let mut connection = ServerConnection::new(config).map_err(tls)?;
    run(wire, &mut connection)?;
    let agreed = agreed(&connection, &preface.encode(), accepted)?;
    std::io::Write::write_all(&mut connection.writer(), &[ACCEPTED])?;
    flush(wire, &mut connection)?;
    Ok(agreed)
}

fn agreed<D>(connection: &ConnectionCommon<D>, prologue: &[u8], suites: &[Suite]) -> Result<Agreed, HandshakeError> {
    let chosen = connection.alpn_protocol().ok_or(HandshakeError::Downgrade)?;
    let named: Vec<Suite> = Suite::ALL.into_iter().filter(|&s| protocols(&[s])[0] == chosen).collect();
    let suite = choose(&named, suites).map_err(|_| HandshakeError::Downgrade)?;
    let secret = connection.export_keying_material([0; SECRET_LEN], EXPORTER, Some(prologue)).map_err(tls)?;
    let secret = Zeroizing::new(secret);
    Ok(Agreed { suite, secret: Secret::new(*secret) })
}

/// Runs the TLS handshake to its end.
fn run<D>(wire: &mut Wire<'_>, connection: &mut ConnectionCommon<D>) -> Result<(), HandshakeError> {
    let mut received = 0;
    loop {
        flush(wire, connection)?;
        if !connection.is_handshaking() {
            return Ok(());
        }
        received += receive(wire, connection)?;
        if received > MAX_FLIGHT {
            return Err(HandshakeError::Malformed("the TLS handshake is too long"));
        }
    }
}

fn flush<D>(wire: &mut Wire<'_>, connection: &mut ConnectionCommon<D>) -> Result<(), HandshakeError> {
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes)?;
    }
    if bytes.is_empty() { Ok(()) } else { wire.write(&bytes) }
}

/// Receives and processes one TLS record. Returns its length in bytes.
fn receive<D>(wire: &mut Wire<'_>, connection: &mut ConnectionCommon<D>) -> Result<usize, HandshakeError> {
    let mut record = vec![0; 5];
    wire.read(&mut record)?;
    let len = usize::from(u16::from_be_bytes([record[3], record[4]]));
    if len > MAX_RECORD {
        return Err(HandshakeError::Malformed("TLS record"));
    }
    record.resize(5 + len, 0);
    wire.read(&mut record[5..])?;
    let mut rest = &record[..];
    while !rest.is_empty() {
        if connection.read_tls(&mut rest)? == 0 {
            return Err(HandshakeError::Malformed("TLS record"));
        }
        if let Err(error) = connection.process_new_packets() {
            // try to send the alert that informs the other side
            let _ = flush(wire, connection);
            return Err(tls(error));
        }
    }
    Ok(record.len())
}
