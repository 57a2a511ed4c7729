//! Tests of TLS with certificates on both sides.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use migration_core::text::describe;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;

use super::*;
use crate::{
    KeyError, TlsIdentity,
    handshake::{
        preface::{Preface, Proof},
        tls::MAX_RECORD,
    },
};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Makes a folder with the files of a host of this name.
    fn folder(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::write(folder.path().join("ca.pem"), self.0.pem()).unwrap();
        fs::write(folder.path().join("cert.pem"), certificate.pem()).unwrap();
        let path = folder.path().join("key.pem");
        fs::write(&path, key.serialize_pem()).unwrap();
        fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
        folder
    }

    fn security(&self, name: &str, peer: &str) -> Security {
        tls(&self.folder(name, |_| {}), peer)
    }
}

fn tls(folder: &TempDir, peer: &str) -> Security {
    Security::new(Credentials::Tls(TlsIdentity::load(folder.path(), peer).unwrap()))
}

#[test]
fn certificates_of_one_authority_work() {
    let authority = Authority::new();
    let mut pair = Pair::new(authority.security("source", "destination"), authority.security("destination", "any"));
    for kind in [LaneKind::Control, LaneKind::Bulk, LaneKind::Reattach, LaneKind::Control] {
        let (mut here, mut there) = pair.open_well(kind);
        there.writer.write_all(b"answer", &[]).unwrap();
        let mut got = [0; 6];
        here.reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"answer");
    }
}

#[test]
fn a_cipher_that_one_side_alone_takes_is_not_chosen() {
    let authority = Authority::new();
    for suite in Suite::ALL {
        let source = Security { suites: vec![suite], ..authority.security("source", "destination") };
        let mut pair = Pair::new(source, authority.security("destination", "any"));
        let (mut here, mut there) = pair.open_well(LaneKind::Control);
        there.writer.write_all(b"answer", &[]).unwrap();
        here.reader.read_exact(&mut [0; 6]).unwrap();
    }
}

/// Connects to a destination as a source that sends `records` instead of a handshake. Returns the
/// destination's error.
fn send_instead(security: &Security, records: &[u8]) -> io::Error {
    let (plain, listener) = memory::link(4 << 20);
    let mut listener = SecureListener::new(Box::new(listener), security.clone());
    let preface =
        Preface { proof: Proof::Tls, kind: LaneKind::Control, counter: 0, session: [0; 16], message: 0 }.encode();
    let mut here = plain.connect().unwrap().split().unwrap();
    here.writer.write_all(&[&preface, records].concat(), &[]).unwrap();
    thread::scope(|scope| {
        let there = scope.spawn(|| accept(&mut listener).err().unwrap());
        here.reader.read_exact(&mut [0; 8]).unwrap();
        drop(here);
        there.join().unwrap()
    })
}

#[test]
fn records_of_unauthenticated_peers_are_bounded() {
    let security = Authority::new().security("destination", "any");
    let cut =
        |error: &io::Error| matches!(why(error), HandshakeError::Link(e) if e.kind() == io::ErrorKind::UnexpectedEof);
    for (len, taken) in [(MAX_RECORD, true), (MAX_RECORD + 1, false)] {
        let error = send_instead(&security, &[&[22, 3, 1], &(len as u16).to_be_bytes()[..]].concat());
        assert_eq!(cut(&error), taken, "{len}: {error}");
        assert!(taken || matches!(why(&error), HandshakeError::Malformed("TLS record")), "{error}");
    }
}

#[test]
fn nothing_secret_is_printed() {
    let text = format!("{:?}", Authority::new().security("destination", "peer").credentials);
    assert!(text.contains("TlsIdentity") && text.contains("peer") && !text.contains("own"), "{text}");
}

#[test]
fn wrong_certificates_are_refused() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let old = ours.folder("destination", |params| params.not_after = date_time_ymd(2001, 1, 1));
    let old_source = ours.folder("source", |params| params.not_after = date_time_ymd(2001, 1, 1));
    let good = || ours.security("source", "destination");
    let there = || ours.security("destination", "any");
    for (what, source, destination) in [
        ("another name", ours.security("source", "elsewhere"), there()),
        ("another authority", good(), theirs.security("destination", "any")),
        ("a source of another authority", theirs.security("source", "destination"), there()),
        ("expired", good(), tls(&old, "any")),
        ("an expired source", tls(&old_source, "destination"), there()),
        (
            "no cipher",
            Security { suites: vec![Suite::Aes128Gcm], ..good() },
            Security { suites: vec![Suite::Aes256Gcm], ..there() },
        ),
    ] {
        let (here, there) = Pair::new(source, destination).open(LaneKind::Control);
        let (here, there) = (here.err().unwrap(), there.err().unwrap());
        assert!(matches!(why(&here), HandshakeError::Tls(_)), "{what}: {here}");
        assert!(!here.to_string().is_empty() && !there.to_string().is_empty(), "{what}");
    }
}

#[test]
fn other_kinds_of_peers_are_refused() {
    let authority = Authority::new();
    let (here, there) = Pair::new(authority.security("source", "destination"), psk(1)).open(LaneKind::Control);
    assert!(matches!(why(&there.err().unwrap()), HandshakeError::Credentials { .. }));
    assert!(here.err().unwrap().to_string().contains("uses a TLS certificate"));
    let (here, there) = Pair::new(psk(1), authority.security("destination", "any")).open(LaneKind::Control);
    assert!(matches!(why(&there.err().unwrap()), HandshakeError::Credentials { .. }));
    assert!(here.err().unwrap().to_string().contains("expects a TLS certificate"));
}

#[test]
fn bad_folders_are_refused() {
    let authority = Authority::new();
    let change = |file: &'static str, text: Option<&str>, mode: u32| {
        let folder = authority.folder("destination", |_| {});
        let path: PathBuf = folder.path().join(file);
        match text {
            Some(text) => fs::write(&path, text).unwrap(),
            None if mode == 0 => fs::remove_file(&path).unwrap(),
            None => fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap(),
        }
        TlsIdentity::load(folder.path(), "peer").unwrap_err()
    };
    for file in ["ca.pem", "cert.pem", "key.pem"] {
        assert!(matches!(change(file, None, 0), KeyError::File { .. }), "{file}");
        let useless = change(file, Some("nothing"), 0);
        assert!(matches!(useless, KeyError::Certificate { .. }), "{file}");
        let cause = std::error::Error::source(&useless).unwrap().to_string();
        assert_eq!(describe(&useless).matches(&cause).count(), 1, "{useless:?}");
    }
    assert!(matches!(change("key.pem", None, 0o640), KeyError::Exposed { .. }));
    // a key that does not belong to the certificate
    let other = KeyPair::generate().unwrap().serialize_pem();
    assert!(matches!(change("key.pem", Some(&other), 0), KeyError::Certificate { .. }));
    let folder = authority.folder("destination", |_| {});
    assert!(matches!(TlsIdentity::load(folder.path(), "no name!"), Err(KeyError::Certificate { .. })));
}
