//! Key files. A secret key is 64 hexadecimal digits in a file that only its owner can read.
//!
//! A file with a secret must be a regular file and no symbolic link. It must belong to root or to
//! the user who reads it, and nobody else may read or change it. Symbolic links in the path of its
//! folder are followed. A public key or a certificate may be a symbolic link and may belong to
//! anyone. But it must not be writable for everyone, because it decides who is trusted.

use std::{
    error::Error,
    fmt,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use snow::{
    params::DHChoice,
    resolvers::{CryptoResolver, DefaultResolver},
};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::secret::{SECRET_LEN, Secret};

/// The length of a key file in bytes: the digits and a line end of up to two bytes.
const FILE_LEN: usize = 2 * SECRET_LEN + 2;

/// The reason why a key file cannot be used. Its text does not repeat its cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// Users other than the owner can read or change the file.
    #[error("{}: others can read or change this key (mode {mode:04o}): make a new one, or `chmod 600` it if nobody did so", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// The permission bits of the file.
        mode: u32,
    },
    /// The file belongs to another user, who can read and change it.
    #[error("{}: this key belongs to another user (uid {owner}): make a new one, or `chown` it if that user never had access", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The user id of the file's owner.
        owner: u32,
    },
    /// The path is not that of a regular file. A secret must not be a symbolic link either.
    #[error("{}: not a regular file (the last part of a secret's path must not be a symbolic link)", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
    },
    /// The file does not hold a key.
    #[error("{}: the file holds no key, which is 64 hexadecimal digits and nothing else", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The operating system returned no random bytes.
    #[error("the operating system returned no random bytes")]
    Random(#[source] Box<dyn Error + Send + Sync>),
    /// The certificates or the private key of a TLS identity cannot be used.
    #[error("{}", path.display())]
    Certificate {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: Box<dyn Error + Send + Sync>,
    },
}

/// A pre-shared key, which both sides have: a peer that has it is trusted. It is erased from memory
/// when it is dropped, and `Debug` does not print it.
#[derive(Clone)]
pub struct Psk(pub(crate) Secret);

/// The private key (X25519) of a side that is identified by its [`PublicKey`]. It is erased from
/// memory when it is dropped, and `Debug` does not print it.
#[derive(Clone)]
pub struct StaticKey {
    pub(crate) private: Secret,
    public: PublicKey,
}

/// A public key, which identifies the owner of a [`StaticKey`]. It is no secret.
/// [`Display`](fmt::Display) writes the digits that a key file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl Psk {
    /// Makes a key of `bytes`, which must come from a cryptographic random number generator.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Secret::new(bytes))
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// Fails if the file is missing, holds no key, can be read or changed by others, belongs to
    /// another user, or is a symbolic link.
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
    /// Makes a private key of `bytes`, which must come from a cryptographic random number
    /// generator.
    pub fn new(bytes: [u8; 32]) -> Self {
        let private = Secret::new(bytes);
        let mut public = [0; 32];
        if let Some(mut dh) = DefaultResolver.resolve_dh(&DHChoice::Curve25519) {
            dh.set(private.bytes());
            public.copy_from_slice(dh.pubkey());
        }
        Self { private, public: PublicKey(public) }
    }

    /// Reads a key file that [`generate`] made.
    ///
    /// # Errors
    /// Fails if the file is missing, holds no key, can be read or changed by others, belongs to
    /// another user, or is a symbolic link.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        Ok(Self::new(*load(path, true)?))
    }

    /// Returns the public key, which the other side must know.
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
    /// Reads a public key from a file, which everyone may read.
    ///
    /// # Errors
    /// Fails if the file is missing, holds no key, or can be changed by everyone.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        Ok(Self(*load(path, false)?))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Writes a new secret to a new file with mode 0600, and the public key that belongs to it to a
/// file of the same name with the suffix `.pub`. Returns the public key. Use the secret either as
/// [`Psk`] or as [`StaticKey`], not as both.
///
/// # Errors
/// Fails if one of the files exists or cannot be written. Then neither file is left.
pub fn generate(path: &Path) -> Result<PublicKey, KeyError> {
    let secret = Secret::random().map_err(|e| KeyError::Random(e.into()))?;
    let mut digits = Zeroizing::new(String::with_capacity(FILE_LEN));
    for byte in secret.bytes() {
        for nibble in [byte >> 4, byte & 15] {
            digits.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
        }
    }
    digits.push('\n');
    let public = StaticKey::new(*secret.bytes()).public();
    write_new(path, 0o600, digits.as_bytes())?;
    // a secret without its public key is of no use, and would make the next attempt fail
    let written = write_new(&public_path(path), 0o644, format!("{public}\n").as_bytes());
    written.inspect_err(|_| drop(fs::remove_file(path)))?;
    Ok(public)
}

/// Returns the path to which [`generate`] writes the public key of the secret in `path`.
pub fn public_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

/// Writes a new file with exactly this mode. Removes the file if it cannot be completed.
fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), KeyError> {
    let failed = |cause| KeyError::File { path: path.to_owned(), cause };
    // fails if the path exists, also as a symbolic link
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    let mut write = || {
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    // ignore an error of the removal, which may fail for the same reason as the write
    write().map_err(failed).inspect_err(|_| drop(fs::remove_file(path)))
}

/// Opens a file with a secret. Refuses it if another user can read or change it.
pub(crate) fn open_private(path: &Path) -> Result<File, KeyError> {
    let (file, found) = open_regular(path, libc::O_NOFOLLOW)?;
    if ![0, effective_user()].contains(&found.uid()) {
        return Err(KeyError::Foreign { path: path.to_owned(), owner: found.uid() });
    }
    exposed_by(path, &found, 0o077)?;
    Ok(file)
}

/// Opens a file with a public key or certificates. Refuses it if everyone can change it.
pub(crate) fn open_public(path: &Path) -> Result<File, KeyError> {
    let (file, found) = open_regular(path, 0)?;
    exposed_by(path, &found, 0o002)?;
    Ok(file)
}

/// Opens a regular file and returns it with its metadata. Does not wait for the writer of a FIFO.
/// The metadata is that of the open file, even if the path is replaced meanwhile.
fn open_regular(path: &Path, flags: i32) -> Result<(File, fs::Metadata), KeyError> {
    let failed = |cause: io::Error| match cause.raw_os_error() {
        Some(libc::ELOOP | libc::ENXIO) => KeyError::NotRegular { path: path.to_owned() },
        _ => KeyError::File { path: path.to_owned(), cause },
    };
    let file = OpenOptions::new().read(true).custom_flags(flags | libc::O_NONBLOCK).open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(KeyError::NotRegular { path: path.to_owned() });
    }
    Ok((file, found))
}

fn exposed_by(path: &Path, found: &fs::Metadata, bits: u32) -> Result<(), KeyError> {
    let mode = found.mode() & 0o7777;
    if mode & bits != 0 {
        return Err(KeyError::Exposed { path: path.to_owned(), mode });
    }
    Ok(())
}

fn effective_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn load(path: &Path, private: bool) -> Result<Zeroizing<[u8; SECRET_LEN]>, KeyError> {
    let failed = |cause| KeyError::File { path: path.to_owned(), cause };
    let file = if private { open_private(path)? } else { open_public(path)? };
    // a longer file holds no key, so it need not be read to its end
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
    use std::os::unix::fs::{chown, symlink};

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
        let taken = generate(&path).unwrap_err();
        assert!(matches!(taken, KeyError::File { .. }));
        let cause = taken.source().and_then(|cause| cause.downcast_ref::<io::Error>());
        assert_eq!(cause.map(io::Error::kind), Some(io::ErrorKind::AlreadyExists));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(format!("{:?}", Psk::load(&path).unwrap()), "Psk(…)");
        assert_eq!(format!("{:?}", StaticKey::load(&path).unwrap()), format!("StaticKey(of {public})"));
    }

    #[test]
    fn exposed_and_malformed_keys_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        generate(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o602, 0o666] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(matches!(Psk::load(&path), Err(KeyError::Exposed { .. })), "{mode:o}");
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        for bad in [
            String::new(),
            good[1..].into(),
            format!("0{good}"),
            format!("{good}\nx"),
            good.replacen(|_| true, "g", 1),
            good.repeat(2),
        ] {
            fs::write(&path, &bad).unwrap();
            assert!(matches!(Psk::load(&path), Err(KeyError::Malformed { .. })), "{bad}");
        }
        assert!(matches!(Psk::load(folder.path().join("none").as_path()), Err(KeyError::File { .. })));
    }

    #[test]
    fn keys_of_others_links_and_what_is_no_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link, fifo) = (folder.path().join("key"), folder.path().join("link"), folder.path().join("fifo"));
        generate(&path).unwrap();
        symlink(&path, &link).unwrap();
        assert!(matches!(Psk::load(&link), Err(KeyError::NotRegular { .. })));
        assert!(matches!(StaticKey::load(folder.path()), Err(KeyError::NotRegular { .. })));
        // a blocking open of a FIFO would wait for a writer for ever
        let mkfifo = std::process::Command::new("mkfifo").args(["-m", "600"]).arg(&fifo).status().unwrap();
        assert!(mkfifo.success());
        assert!(matches!(Psk::load(&fifo), Err(KeyError::NotRegular { .. })));
        assert!(matches!(PublicKey::load(&fifo), Err(KeyError::NotRegular { .. })));
        // the path of the folder may have symbolic links, and a public key may be one
        let other = folder.path().join("other");
        symlink(folder.path(), &other).unwrap();
        Psk::load(&other.join("key")).unwrap();
        symlink(public_path(&path), folder.path().join("link.pub")).unwrap();
        PublicKey::load(&public_path(&link)).unwrap();
        // a public key that everyone can change is refused
        fs::set_permissions(public_path(&path), Permissions::from_mode(0o646)).unwrap();
        assert!(matches!(PublicKey::load(&public_path(&path)), Err(KeyError::Exposed { mode: 0o646, .. })));
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: keys of another owner need root");
        }
        for other in [1, 54321] {
            chown(&path, Some(other), None).unwrap();
            assert!(matches!(Psk::load(&path), Err(KeyError::Foreign { owner, .. }) if owner == other));
        }
        assert!(matches!(StaticKey::load(&path), Err(KeyError::Foreign { .. })));
    }

    #[test]
    fn half_a_pair_is_not_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (path, victim) = (folder.path().join("key"), folder.path().join("victim"));
        let public = public_path(&path);
        for plant in [fs::hard_link::<&Path, &Path>, symlink] {
            fs::write(&victim, "untouched").unwrap();
            plant(&victim, &public).unwrap();
            assert!(matches!(generate(&path), Err(KeyError::File { .. })));
            assert!(!path.exists());
            // a symbolic link in the place of the secret is not followed either
            plant(&victim, &path).unwrap();
            assert!(matches!(generate(&path), Err(KeyError::File { .. })));
            assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
            fs::remove_file(&path).unwrap();
            fs::remove_file(&public).unwrap();
        }
    }
}
