//! Encryption as users ask for it: the options of both sides, and `keygen`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use migration_core::channel::Connector;
use migration_crypto::{
    Credentials, KeyError, Psk, PublicKey, Security, SourceSession, StaticKey, Suite, TlsIdentity,
    aead::{self, Backend, RustCrypto},
    keys,
};
use migration_transport::Address;
use serde::{Deserialize, Serialize};

use crate::cli;

/// How a migration is encrypted.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Encrypt {
    /// Not at all.
    #[default]
    None,
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    #[value(name = "chacha20-poly1305")]
    ChaCha20Poly1305,
    /// Any of these, after a handshake of TLS 1.3.
    Tls,
}

/// Who does the ciphers' work.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Library {
    /// The fastest of this build.
    #[default]
    Fastest,
    /// The crates of RustCrypto.
    Rust,
}

impl Library {
    pub(crate) fn backend(self) -> &'static dyn Backend {
        match self {
            Self::Fastest => aead::best(),
            Self::Rust => &RustCrypto,
        }
    }
}

#[derive(Args, Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Encryption {
    /// The cipher; both sides must say the same, and prove who they are in the same way.
    #[arg(long, default_value = "none")]
    pub(crate) encrypt: Encrypt,
    /// A key that both sides have: 64 hexadecimal digits in a file of mode 0600 (`minivmm keygen`).
    #[arg(long, value_name = "F", conflicts_with_all = ["static_key", "tls_dir"])]
    pub(crate) psk_file: Option<PathBuf>,
    /// This side's own key, in a file like that.
    #[arg(long, value_name = "F", requires = "peer_key", conflicts_with = "tls_dir")]
    pub(crate) static_key: Option<PathBuf>,
    /// The public key of the only peer that will do (the file with `.pub` of its `keygen`).
    #[arg(long, value_name = "F", requires = "static_key")]
    pub(crate) peer_key: Option<PathBuf>,
    /// A folder with ca.pem, cert.pem and key.pem.
    #[arg(long, value_name = "D")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Who does the ciphers' work; each side may say what it likes.
    #[arg(long, default_value = "fastest")]
    pub(crate) cipher_library: Library,
}

#[derive(Args, Debug)]
pub(crate) struct Keygen {
    /// The file to make; the public key goes beside it, with `.pub` behind the name.
    #[arg(long, value_name = "F")]
    out: PathBuf,
}

impl Encryption {
    /// Checks that the options go together, as far as the command line's own rules do not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let keys = self.psk_file.is_some() || self.static_key.is_some() || self.tls_dir.is_some();
        match self.encrypt {
            Encrypt::None if keys => Err("a key without a cipher: say --encrypt, too".into()),
            Encrypt::None => Ok(()),
            Encrypt::Tls if self.tls_dir.is_none() => Err("--encrypt tls needs --tls-dir D".into()),
            _ if !keys => Err("--encrypt needs --psk-file F, --static-key F with --peer-key F, or --tls-dir D".into()),
            _ => Ok(()),
        }
    }

    /// The same for another process.
    pub(crate) fn absolute(&self) -> Result<Self, String> {
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(cli::absolute).transpose();
        Ok(Self {
            encrypt: self.encrypt,
            psk_file: absolute(&self.psk_file)?,
            static_key: absolute(&self.static_key)?,
            peer_key: absolute(&self.peer_key)?,
            tls_dir: absolute(&self.tls_dir)?,
            cipher_library: self.cipher_library,
        })
    }

    /// As a command line has it.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let named = |value: Option<clap::builder::PossibleValue>| value.map(|v| v.get_name().to_owned());
        let path = |path: &Option<PathBuf>| path.as_ref().map(|p| p.display().to_string());
        let options = [
            ("--encrypt", named(self.encrypt.to_possible_value())),
            ("--psk-file", path(&self.psk_file)),
            ("--static-key", path(&self.static_key)),
            ("--peer-key", path(&self.peer_key)),
            ("--tls-dir", path(&self.tls_dir)),
            ("--cipher-library", named(self.cipher_library.to_possible_value())),
        ];
        options.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?])).flatten().collect()
    }

    /// Reads the keys. `peer` is the destination's address, whose host its certificate must name; `None` at the
    /// destination. `None` if nothing is to be encrypted.
    pub(crate) fn security(&self, peer: Option<&Address>) -> Result<Option<Security>, String> {
        self.check()?;
        let suites = match self.encrypt {
            Encrypt::None => return Ok(None),
            Encrypt::Aes128Gcm => vec![Suite::Aes128Gcm],
            Encrypt::Aes256Gcm => vec![Suite::Aes256Gcm],
            Encrypt::ChaCha20Poly1305 => vec![Suite::ChaCha20Poly1305],
            Encrypt::Tls => Suite::ALL.to_vec(),
        };
        let credentials = self.credentials(peer).map_err(|e| e.to_string())?;
        let credentials = credentials.ok_or("no key is given")?;
        Ok(Some(Security { suites, backend: self.cipher_library.backend(), ..Security::new(credentials) }))
    }

    fn credentials(&self, peer: Option<&Address>) -> Result<Option<Credentials>, KeyError> {
        Ok(match (&self.psk_file, &self.static_key, &self.peer_key, &self.tls_dir) {
            (Some(file), ..) => Some(Credentials::Psk(Psk::load(file)?)),
            (_, Some(own), Some(peer), _) => {
                Some(Credentials::Static { own: StaticKey::load(own)?, peer: PublicKey::load(peer)? })
            }
            (_, _, _, Some(dir)) => {
                let name = match peer {
                    Some(Address::Tcp { host, .. }) => host,
                    _ => "localhost",
                };
                Some(Credentials::Tls(TlsIdentity::load(dir, name)?))
            }
            _ => None,
        })
    }
}

/// The channels of `link`, in the session if there is one.
pub(crate) fn secured(session: Option<&SourceSession>, link: Box<dyn Connector>) -> Box<dyn Connector> {
    match session {
        Some(session) => Box::new(session.connector(link)),
        None => link,
    }
}

/// `minivmm keygen`.
pub(crate) fn keygen(args: &Keygen) -> Result<u8, String> {
    let public = keys::generate(&args.out).map_err(|e| e.to_string())?;
    out!("public {public}");
    Ok(0)
}
