//! The encryption options of both sides, and `keygen`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use migration_core::{channel::Connector, text::describe};
use migration_crypto::{
    Credentials, KeyError, Psk, PublicKey, Security, SourceSession, StaticKey, Suite, TlsIdentity,
    aead::{self, Backend, RustCrypto},
    keys,
};
use migration_transport::Address;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::values::{self, InvalidValue};

/// The reason why a migration cannot be encrypted as its options demand.
#[derive(Debug, Error)]
pub enum EncryptionError {
    /// The options contradict each other.
    #[error("{0}")]
    Options(&'static str),
    /// A key cannot be read or made.
    #[error(transparent)]
    Key(KeyError),
}

/// Returns the text, for programs whose errors are texts.
impl From<EncryptionError> for String {
    fn from(error: EncryptionError) -> Self {
        describe(error)
    }
}

/// The encryption of a migration.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Encrypt {
    /// No encryption.
    #[default]
    None,
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    #[value(name = "chacha20-poly1305")]
    ChaCha20Poly1305,
    /// Any of these ciphers, after a handshake of TLS 1.3.
    Tls,
}

/// The implementation of the ciphers.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Library {
    /// The fastest one of this build.
    #[default]
    Fastest,
    /// The crates of RustCrypto.
    Rust,
}

impl Library {
    /// Returns the implementation.
    pub fn backend(self) -> &'static dyn Backend {
        match self {
            Self::Fastest => aead::best(),
            Self::Rust => &RustCrypto,
        }
    }
}

#[allow(missing_docs, reason = "clap takes the text for the help of the command that has these options")]
#[derive(Args, Clone, Debug, Default, Deserialize, Serialize)]
pub struct Encryption {
    /// Cipher. Both sides must use the same option and the same kind of credentials.
    #[arg(long, default_value = "none")]
    pub encrypt: Encrypt,
    /// Key that both sides have: a file of mode 0600 with 64 hexadecimal digits (`minivmm keygen`).
    #[arg(long, value_name = "F", conflicts_with_all = ["static_key", "tls_dir"])]
    pub psk_file: Option<PathBuf>,
    /// This side's own key, in a file of the same format.
    #[arg(long, value_name = "F", requires = "peer_key", conflicts_with = "tls_dir")]
    pub static_key: Option<PathBuf>,
    /// Public key of the only accepted peer (the file with `.pub` from its `keygen`).
    #[arg(long, value_name = "F", requires = "static_key")]
    pub peer_key: Option<PathBuf>,
    /// A folder with ca.pem, cert.pem and key.pem.
    #[arg(long, value_name = "D")]
    pub tls_dir: Option<PathBuf>,
    /// Implementation of the ciphers; each side may choose its own.
    #[arg(long, default_value = "fastest")]
    pub cipher_library: Library,
}

/// Make a key for encrypted migrations.
#[derive(Args, Debug)]
pub struct Keygen {
    /// File for the key. The public key gets the same name with `.pub` appended.
    #[arg(long, value_name = "F")]
    out: PathBuf,
}

impl Encryption {
    /// Checks that the options are consistent, as far as the rules of the command line do not
    /// ensure it.
    ///
    /// # Errors
    /// Returns [`EncryptionError::Options`] if they are not.
    pub fn check(&self) -> Result<(), EncryptionError> {
        let refused = |why| Err(EncryptionError::Options(why));
        let keys = self.psk_file.is_some() || self.static_key.is_some() || self.tls_dir.is_some();
        match self.encrypt {
            Encrypt::None if keys => refused("a key without a cipher: give --encrypt, too"),
            Encrypt::None => Ok(()),
            Encrypt::Tls if self.tls_dir.is_none() => refused("--encrypt tls needs --tls-dir D"),
            _ if !keys => refused("--encrypt needs --psk-file F, --static-key F with --peer-key F, or --tls-dir D"),
            _ => Ok(()),
        }
    }

    /// Returns the same options for another process, whose working directory may differ.
    ///
    /// # Errors
    /// Returns an error if the working directory does not exist any more.
    pub fn absolute(&self) -> Result<Self, InvalidValue> {
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(values::absolute).transpose();
        Ok(Self {
            encrypt: self.encrypt,
            psk_file: absolute(&self.psk_file)?,
            static_key: absolute(&self.static_key)?,
            peer_key: absolute(&self.peer_key)?,
            tls_dir: absolute(&self.tls_dir)?,
            cipher_library: self.cipher_library,
        })
    }

    /// Returns the options in the form of command-line arguments.
    pub fn arguments(&self) -> Vec<String> {
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

    /// Reads the keys and returns the settings for secure channels, or `None` without encryption.
    /// `peer` is the destination's address. The destination's certificate must be for the host in
    /// it. `peer` is `None` at the destination.
    ///
    /// # Errors
    /// Returns an error if the options are inconsistent or a key cannot be read.
    pub fn security(&self, peer: Option<&Address>) -> Result<Option<Security>, EncryptionError> {
        self.check()?;
        let suites = match self.encrypt {
            Encrypt::None => return Ok(None),
            Encrypt::Aes128Gcm => vec![Suite::Aes128Gcm],
            Encrypt::Aes256Gcm => vec![Suite::Aes256Gcm],
            Encrypt::ChaCha20Poly1305 => vec![Suite::ChaCha20Poly1305],
            Encrypt::Tls => Suite::ALL.to_vec(),
        };
        let credentials = self.credentials(peer).map_err(EncryptionError::Key)?;
        let credentials = credentials.ok_or(EncryptionError::Options("no key is given"))?;
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

/// Returns a connector for the channels of `link`, in the session if there is one.
pub fn secured(session: Option<&SourceSession>, link: Box<dyn Connector>) -> Box<dyn Connector> {
    match session {
        Some(session) => Box::new(session.connector(link)),
        None => link,
    }
}

/// Runs `minivmm keygen`. Returns the exit status.
///
/// # Errors
/// Returns an error if the files cannot be written.
pub fn keygen(args: &Keygen) -> Result<u8, EncryptionError> {
    let public = keys::generate(&args.out).map_err(EncryptionError::Key)?;
    out!("public {public}");
    Ok(0)
}
