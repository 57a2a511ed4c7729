//! Keys in files: a secret is 64 hexadecimal digits in a file that only its owner can read.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use snow::{
    params::DHChoice,
    resolvers::{CryptoResolver, DefaultResolver},
};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::secret::{SECRET_LEN, Secret};

/// Digits of a key, and a line's end.
const FILE_LEN: usize = 2 * SECRET_LEN + 2;

/// What is wrong with a key file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// It cannot be read or written.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// Others than its owner can read or change it.
    #[error("{}: others can read or change this key (mode {mode:04o}): make a new one, or `chmod 600` it if nobody has", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds no key.
    #[error("{}: a key is 64 hexadecimal digits and nothing else", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The operating system has no random bytes to give.
    #[error("no random bytes: {0}")]
    Random(String),
    /// The certificates or the private key of a TLS identity are of no use.
    #[error("{}: {why}", path.display())]
    Certificate {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// A key that both sides have: who has it is trusted. Erased when dropped, never printed.
#[derive(Clone)]
pub struct Psk(pub(crate) Secret);

/// The private key of a side that is known by its [`PublicKey`] (X25519). Erased when dropped, never printed.
#[derive(Clone)]
pub struct StaticKey {
    pub(crate) private: Secret,
    public: PublicKey,
}

/// Names the owner of a [`StaticKey`]; no secret. [`Display`](fmt::Display) gives the digits that a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl Psk {
    /// A key of these bytes, which must be as random as any key.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Secret::new(bytes))
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// When it is missing, no key, or exposed to others.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        Ok(Self(Secret::new(*load(path, true)?)))
    }
}

impl fmt::Debug for Psk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Psk(…)")
    }
}

impl StaticKey {
    /// The private key of these bytes, which must be as random as any key.
    pub fn new(bytes: [u8; 32]) -> Self {
        let private = Secret::new(bytes);
        let mut public = [0; 32];
        if let Some(mut dh) = DefaultResolver.resolve_dh(&DHChoice::Curve25519) {
            dh.set(private.bytes());
            public.copy_from_slice(dh.pubkey());
        }
        Self { private, public: PublicKey(public) }
    }

    /// Reads a key file; any that [`generate`] made will do.
    ///
    /// # Errors
    /// When it is missing, no key, or exposed to others.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        Ok(Self::new(*load(path, true)?))
    }

    /// What the other side must know.
    pub fn public(&self) -> PublicKey {
        self.public
    }
}

impl fmt::Debug for StaticKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StaticKey(of {})", self.public)
    }
}

impl PublicKey {
    /// Reads a public key's file. Anyone may read it.
    ///
    /// # Errors
    /// When it is missing or no key.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        Ok(Self(*load(path, false)?))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Writes a fresh secret to a new file of mode 0600, to be used as [`Psk`] or as [`StaticKey`], and the public key of the
/// latter beside it, in a file of the same name with `.pub` behind it. Use it as one of the two only.
///
/// # Errors
/// When one of the files exists or cannot be written.
pub fn generate(path: &Path) -> Result<PublicKey, KeyError> {
    let secret = Secret::random().map_err(|e| KeyError::Random(e.to_string()))?;
    let mut digits = Zeroizing::new(String::with_capacity(FILE_LEN));
    for byte in secret.bytes() {
        for nibble in [byte >> 4, byte & 15] {
            digits.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
        }
    }
    digits.push('\n');
    let public = StaticKey::new(*secret.bytes()).public();
    write_new(path, 0o600, digits.as_bytes())?;
    write_new(&public_path(path), 0o644, format!("{public}\n").as_bytes())?;
    Ok(public)
}

/// Where [`generate`] puts the public key of the secret in `path`.
pub fn public_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), KeyError> {
    let failed = |cause| KeyError::File { path: path.to_owned(), cause };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)
}

/// Opens a file with a secret, if nobody else can read or change it.
pub(crate) fn open_private(path: &Path) -> Result<File, KeyError> {
    let failed = |cause| KeyError::File { path: path.to_owned(), cause };
    let file = File::open(path).map_err(failed)?;
    // of what was opened, which the path may not lead to any more
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Exposed { path: path.to_owned(), mode });
    }
    Ok(file)
}

fn load(path: &Path, private: bool) -> Result<Zeroizing<[u8; SECRET_LEN]>, KeyError> {
    let failed = |cause| KeyError::File { path: path.to_owned(), cause };
    let file = if private { open_private(path)? } else { File::open(path).map_err(failed)? };
    // more than a key is no key: no need to read it all
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_LEN + 1));
    file.take(FILE_LEN as u64 + 1).read_to_end(&mut text).map_err(failed)?;
    let digits = text.trim_ascii_end();
    let mut key = Zeroizing::new([0; SECRET_LEN]);
    let value = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
    let (pairs, odd) = digits.as_chunks::<2>();
    let fits = pairs.len() == SECRET_LEN && odd.is_empty();
    let parsed = key.iter_mut().zip(pairs).try_for_each(|(byte, &[high, low])| {
        *byte = value(high)? << 4 | value(low)?;
        Some(())
    });
    parsed.filter(|()| fits).ok_or_else(|| KeyError::Malformed { path: path.to_owned() })?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn generated_keys_load_and_no_file_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let public = generate(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(StaticKey::load(&path).unwrap().public(), public);
        assert_eq!(PublicKey::load(&public_path(&path)).unwrap(), public);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.trim_end().len(), 64);
        assert!(matches!(generate(&path), Err(KeyError::File { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(format!("{:?}", Psk::load(&path).unwrap()), "Psk(…)");
    }

    #[test]
    fn exposed_and_malformed_keys_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        generate(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o602, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(matches!(Psk::load(&path), Err(KeyError::Exposed { .. })), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        for bad in
            [String::new(), good[1..].into(), format!("0{good}"), good.replacen(|_| true, "g", 1), good.repeat(2)]
        {
            fs::write(&path, &bad).unwrap();
            assert!(matches!(Psk::load(&path), Err(KeyError::Malformed { .. })), "{bad}");
        }
        assert!(matches!(Psk::load(folder.path().join("none").as_path()), Err(KeyError::File { .. })));
    }
}
