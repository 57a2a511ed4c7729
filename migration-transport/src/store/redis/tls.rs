//! The files of a TLS connection.
//!
//! TLS is that of `rustls`, which the crate `redis` calls for each connection. The crate reads the
//! list of authorities that the system trusts for each connection too, also when files name others.

use std::{
    fs,
    io::{self, ErrorKind, Read},
    path::Path,
};

use redis::{ClientTlsConfig, TlsCertificates};
use rustls::{
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use crate::store::url::TlsFiles;

/// The largest file with certificates or a key.
const MAX_PEM_BYTES: u64 = 4 << 20;

/// Reads the files.
///
/// The crate `redis` takes the cryptography that the process has chosen. If the process has not
/// chosen any, this chooses AWS-LC: a build with two of them has no other default.
///
/// # Errors
/// Returns an error if a file cannot be read, or is not what it should be.
pub(super) fn certificates(files: &TlsFiles) -> io::Result<TlsCertificates> {
    if CryptoProvider::get_default().is_none() {
        // an error says that another thread has chosen meanwhile
        let _ = aws_lc_rs::default_provider().install_default();
    }
    let root_cert = files.ca.as_deref().map(read_certificates).transpose()?;
    let Some(identity) = &files.identity else { return Ok(TlsCertificates { client_tls: None, root_cert }) };
    let client_cert = read_certificates(&identity.certificate)?;
    let client_key = read_key(&identity.key)?;
    Ok(TlsCertificates { client_tls: Some(ClientTlsConfig { client_cert, client_key }), root_cert })
}

/// Returns the text of a file that holds at least one certificate, and none that cannot be read.
fn read_certificates(path: &Path) -> io::Result<Vec<u8>> {
    let pem = read_pem(path)?;
    let mut count = 0;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        certificate.map_err(|error| wrong(path, error))?;
        count += 1;
    }
    match count {
        0 => Err(wrong(path, "it holds no certificate")),
        _ => Ok(pem),
    }
}

fn read_key(path: &Path) -> io::Result<Vec<u8>> {
    let pem = read_pem(path)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| wrong(path, error))?;
    Ok(pem)
}

fn read_pem(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_PEM_BYTES).read_to_end(&mut bytes));
    read.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(bytes)
}

fn wrong(path: &Path, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, format!("{}: {why}", path.display()))
}
