//! Where page stores are, in the notation of operators.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use migration_core::{
    limits::MAX_STORE_NAME,
    store::{MemoryPageStore, PageStore, StoreError},
};
use thiserror::Error;

use super::{FilePageStore, FilePageStoreOptions};
#[cfg(feature = "redis")]
use crate::{Address, UNIX_PATH_MAX};

/// The port of a Valkey or Redis server whose URL names none.
#[cfg(feature = "redis")]
const DEFAULT_PORT: &str = "6379";
/// Most servers that the URL of a cluster names. The cluster itself tells of all others.
#[cfg(feature = "redis")]
const MAX_SEEDS: usize = 64;

/// Where a page store is.
///
/// | text | store |
/// |---|---|
/// | `memory:` | a [`MemoryPageStore`] of this process, with up to half of the host's RAM |
/// | `file:DIR` | a [`FilePageStore`] with its default options |
/// | `redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]` | a `RedisPageStore` over TCP |
/// | `rediss://…[?ca=FILE][&cert=FILE&key=FILE]` | the same, over TLS 1.3 |
/// | `redis+unix:PATH[?db=DB&user=USER&password=PASSWORD]` | the same, over a Unix socket |
/// | `redis-cluster://[[USER]:PASSWORD@]HOST:PORT,…` | a cluster, of which these servers are some |
/// | `rediss-cluster://…[?ca=FILE][&cert=FILE&key=FILE]` | the same, over TLS 1.3 |
///
/// `%XX` in a user, a password and a value after `?` stands for a byte. The forms with `redis` need
/// the feature `redis`. Neither `Debug` nor `Display` shows a password.
///
/// ```
/// use migration_transport::StoreUrl;
///
/// let url: StoreUrl = "file:/var/lib/pages".parse()?;
/// assert_eq!(url, StoreUrl::File("/var/lib/pages".into()));
/// assert_eq!(url.to_string(), "file:/var/lib/pages");
/// # Ok::<(), migration_transport::StoreUrlError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreUrl {
    /// `memory:`.
    Memory,
    /// `file:DIR`.
    File(PathBuf),
    /// Valkey or Redis.
    #[cfg(feature = "redis")]
    Redis(RedisUrl),
}

/// A page store and the name under which both sides have configured it: `NAME=URL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedStore {
    /// 1 to [`MAX_STORE_NAME`] printable ASCII characters without spaces, commas and `=`.
    pub name: String,
    /// Where the store is.
    pub url: StoreUrl,
}

/// Valkey or Redis: the servers, and how they are spoken to.
#[cfg(feature = "redis")]
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl {
    /// The server. Of a cluster, some of its servers, at least one.
    pub servers: Vec<Address>,
    /// Whether the servers are a cluster.
    pub cluster: bool,
    /// The number of the database. 0 in a cluster.
    pub database: u32,
    /// The user, if it is not the default one.
    pub user: Option<String>,
    /// The password.
    pub password: Option<String>,
    /// The files that TLS needs; `None` for no TLS.
    pub tls: Option<TlsFiles>,
}

/// The files of a TLS connection to a store, all of them PEM.
#[cfg(feature = "redis")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that may issue the server's. `None` for those that the
    /// system trusts.
    pub ca: Option<PathBuf>,
    /// What this client shows, if the server asks for it.
    pub identity: Option<IdentityFiles>,
}

/// The files with which a client shows who it is.
#[cfg(feature = "redis")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The client's certificate, followed by intermediate ones.
    pub certificate: PathBuf,
    /// The private key of that certificate.
    pub key: PathBuf,
}

/// The reason why a text is not the URL of a store. It never has a password in it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreUrlError {
    /// The text begins with none of the known schemes.
    #[error(
        "a store's URL begins with `memory:`, `file:`, `redis://`, `rediss://`, `redis+unix:`, `redis-cluster://` or \
         `rediss-cluster://`"
    )]
    UnknownScheme,
    /// The URL is one of Valkey or Redis, and this build knows neither.
    #[error("this program was built without the feature `redis`")]
    NotBuilt,
    /// Something follows `memory:`, or nothing follows a scheme that needs a path.
    #[error("`{scheme}:` is followed by {expected}")]
    BadPath {
        /// The scheme.
        scheme: &'static str,
        /// What follows it.
        expected: &'static str,
    },
    /// A server is no `HOST:PORT`.
    #[error("`{0}`: a server is HOST:PORT")]
    BadServer(String),
    /// There are too many servers, or more than one that is not in a cluster.
    #[error("{0} servers: a store has one, or 1 to 64 of a cluster")]
    BadServerCount(usize),
    /// The database is no number, or stands in the URL of a cluster, which has only one.
    #[error("`{0}`: a database is a number from 0 to 4294967295, and a cluster has only number 0")]
    BadDatabase(String),
    /// A user or password is no UTF-8, or has a `%` without two hexadecimal digits.
    #[error("the {0} is not valid: %XX stands for a byte, and all of it is UTF-8")]
    BadSecret(&'static str),
    /// The part after `?` has a key that is unknown, or given twice, or a certificate without its
    /// key.
    #[error("`{0}` after the `?` is unknown here, given twice, or lacks its counterpart")]
    BadOption(String),
    /// The text before the `=` of a [`NamedStore`] is missing or too long.
    #[error(
        "a store is NAME=URL, with a name of 1 to {MAX_STORE_NAME} printable characters without spaces, commas and `=`"
    )]
    BadName,
}

impl StoreUrl {
    /// Opens the store with default options. `name` is the name under which both sides have
    /// configured it.
    ///
    /// # Errors
    /// Fails as the store's own function does.
    pub fn open(&self, name: &str) -> Result<Arc<dyn PageStore>, StoreError> {
        Ok(match self {
            Self::Memory => Arc::new(MemoryPageStore::new(name, half_of_ram())),
            Self::File(folder) => Arc::new(FilePageStore::open(folder, name, FilePageStoreOptions::default())?),
            #[cfg(feature = "redis")]
            Self::Redis(url) => Arc::new(super::RedisPageStore::open(url, name, Default::default())?),
        })
    }
}

impl NamedStore {
    /// Opens the store with default options.
    ///
    /// # Errors
    /// Fails as the store's own function does.
    pub fn open(&self) -> Result<Arc<dyn PageStore>, StoreError> {
        self.url.open(&self.name)
    }
}

/// Returns half of the host's RAM in bytes, or 1 GiB if the host does not say how much it has.
fn half_of_ram() -> u64 {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    total.map_or(1 << 30, |kib| kib.saturating_mul(512))
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let (scheme, rest) = text.split_once(':').ok_or(StoreUrlError::UnknownScheme)?;
        match scheme {
            "memory" if rest.is_empty() => Ok(Self::Memory),
            "memory" => Err(StoreUrlError::BadPath { scheme: "memory", expected: "nothing" }),
            "file" if rest.is_empty() || rest.contains('\0') => {
                Err(StoreUrlError::BadPath { scheme: "file", expected: "the path of a folder" })
            }
            "file" => Ok(Self::File(rest.into())),
            "redis" | "rediss" | "redis+unix" | "redis-cluster" | "rediss-cluster" => redis(scheme, rest),
            _ => Err(StoreUrlError::UnknownScheme),
        }
    }
}

#[cfg(not(feature = "redis"))]
fn redis(_scheme: &str, _rest: &str) -> Result<StoreUrl, StoreUrlError> {
    Err(StoreUrlError::NotBuilt)
}

/// Reads what follows the scheme of a server.
#[cfg(feature = "redis")]
fn redis(scheme: &str, rest: &str) -> Result<StoreUrl, StoreUrlError> {
    let (rest, options) = rest.split_once('?').unwrap_or((rest, ""));
    let mut options = Options::parse(options)?;
    let url = if scheme == "redis+unix" {
        let fits = !rest.is_empty() && rest.len() <= UNIX_PATH_MAX && !rest.contains('\0');
        let wrong = StoreUrlError::BadPath { scheme: "redis+unix", expected: "the path of a socket" };
        let path = fits.then(|| PathBuf::from(rest)).ok_or(wrong)?;
        RedisUrl {
            servers: vec![Address::Unix(path)],
            cluster: false,
            database: options.take("db").map_or(Ok(0), |text| database(&text))?,
            user: options.take("user"),
            password: options.take("password"),
            tls: None,
        }
    } else {
        over_tcp(scheme, rest, &mut options)?
    };
    options.finish()?;
    Ok(StoreUrl::Redis(url))
}

#[cfg(feature = "redis")]
fn over_tcp(scheme: &str, rest: &str, options: &mut Options) -> Result<RedisUrl, StoreUrlError> {
    let cluster = scheme.ends_with("-cluster");
    let rest = rest.strip_prefix("//").ok_or(StoreUrlError::UnknownScheme)?;
    // a password may have an `@` in it
    let (secret, rest) = rest.rsplit_once('@').map_or((None, rest), |(secret, rest)| (Some(secret), rest));
    let (user, password) = match secret.map(|secret| secret.split_once(':').ok_or(StoreUrlError::BadSecret("user"))) {
        None => (None, None),
        Some(parts) => {
            let (user, password) = parts?;
            let user = (!user.is_empty()).then(|| decode(user, "user")).transpose()?;
            (user, Some(decode(password, "password")?))
        }
    };
    let (servers, number) = rest.split_once('/').unwrap_or((rest, ""));
    let servers: Vec<_> = servers.split(',').map(server).collect::<Result<_, _>>()?;
    if servers.len() > if cluster { MAX_SEEDS } else { 1 } {
        return Err(StoreUrlError::BadServerCount(servers.len()));
    }
    let database = if number.is_empty() { 0 } else { database(number)? };
    if cluster && database != 0 {
        return Err(StoreUrlError::BadDatabase(number.to_owned()));
    }
    let tls = if scheme.starts_with("rediss") { Some(TlsFiles::from_options(options)?) } else { None };
    Ok(RedisUrl { servers, cluster, database, user, password, tls })
}

#[cfg(feature = "redis")]
impl TlsFiles {
    fn from_options(options: &mut Options) -> Result<Self, StoreUrlError> {
        let ca = options.take("ca").map(PathBuf::from);
        let identity = match (options.take("cert"), options.take("key")) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(IdentityFiles { certificate: certificate.into(), key: key.into() }),
            (Some(_), None) => return Err(StoreUrlError::BadOption("cert".into())),
            (None, Some(_)) => return Err(StoreUrlError::BadOption("key".into())),
        };
        Ok(Self { ca, identity })
    }
}

#[cfg(feature = "redis")]
fn database(text: &str) -> Result<u32, StoreUrlError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| StoreUrlError::BadDatabase(text.to_owned()))
}

/// Reads `HOST[:PORT]`.
#[cfg(feature = "redis")]
fn server(text: &str) -> Result<Address, StoreUrlError> {
    let has_port = text.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
    let port = if has_port { String::new() } else { format!(":{DEFAULT_PORT}") };
    match format!("tcp:{text}{port}").parse() {
        Ok(Address::Tcp { host, port }) if port != 0 => Ok(Address::Tcp { host, port }),
        _ => Err(StoreUrlError::BadServer(text.to_owned())),
    }
}

/// The part after `?`: keys with values.
#[cfg(feature = "redis")]
struct Options(Vec<(String, String)>);

#[cfg(feature = "redis")]
impl Options {
    fn parse(text: &str) -> Result<Self, StoreUrlError> {
        let mut options: Vec<(String, String)> = Vec::new();
        for option in text.split('&').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            if options.iter().any(|(other, _)| other == key) {
                return Err(StoreUrlError::BadOption(key.to_owned()));
            }
            options.push((key.to_owned(), decode(value, "value after the `?`")?));
        }
        Ok(Self(options))
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().position(|(other, _)| other == key)?;
        Some(self.0.swap_remove(at).1)
    }

    fn finish(self) -> Result<(), StoreUrlError> {
        self.0.into_iter().next().map_or(Ok(()), |(key, _)| Err(StoreUrlError::BadOption(key)))
    }
}

/// Replaces each `%XX` by its byte.
#[cfg(feature = "redis")]
fn decode(text: &str, what: &'static str) -> Result<String, StoreUrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = after.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let digits = digits.and_then(|digits| str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or(StoreUrlError::BadSecret(what))?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| StoreUrlError::BadSecret(what))
}

impl FromStr for NamedStore {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let (name, url) = text.split_once('=').ok_or(StoreUrlError::BadName)?;
        let good = |byte: u8| byte.is_ascii_graphic() && byte != b',';
        if name.is_empty() || name.len() > MAX_STORE_NAME || !name.bytes().all(good) {
            return Err(StoreUrlError::BadName);
        }
        Ok(Self { name: name.to_owned(), url: url.parse()? })
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |f: &mut fmt::Formatter<'_>, path: &Path| write!(f, "file:{}", path.display());
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::File(folder) => path(f, folder),
            #[cfg(feature = "redis")]
            Self::Redis(url) => url.fmt(f),
        }
    }
}

/// Writes the URL without user, password and the names of files.
#[cfg(feature = "redis")]
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = if self.tls.is_some() { "s" } else { "" };
        let cluster = if self.cluster { "-cluster" } else { "" };
        for (at, server) in self.servers.iter().enumerate() {
            let text = server.to_string();
            let place = text.strip_prefix("tcp:").unwrap_or(&text);
            match (at, server) {
                (_, Address::Unix(path)) => write!(f, "redis+unix:{}", path.display())?,
                (0, _) => write!(f, "redis{tls}{cluster}://{place}")?,
                (_, _) => write!(f, ",{place}")?,
            }
        }
        match (self.database, self.servers.first()) {
            (0, _) => Ok(()),
            (number, Some(Address::Unix(_))) => write!(f, "?db={number}"),
            (number, _) => write!(f, "/{number}"),
        }
    }
}

#[cfg(feature = "redis")]
impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisUrl")
            .field("url", &self.to_string())
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "…"))
            .field("tls", &self.tls)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<StoreUrl, StoreUrlError> {
        text.parse()
    }

    #[test]
    fn plain_stores_are_read() {
        assert_eq!(parse("memory:"), Ok(StoreUrl::Memory));
        assert_eq!(parse("file:pages"), Ok(StoreUrl::File("pages".into())));
        for (text, scheme) in [("memory:x", "memory"), ("file:", "file")] {
            assert!(matches!(parse(text), Err(StoreUrlError::BadPath { scheme: s, .. }) if s == scheme), "{text}");
        }
        for text in ["", "pages", "tcp:host:1", "FILE:x", "redis", "http://h"] {
            assert_eq!(parse(text), Err(StoreUrlError::UnknownScheme), "{text}");
        }
        let store = parse("memory:").unwrap().open("rack-7").unwrap();
        assert_eq!(store.name(), "rack-7");
        assert!(store.room() >= 1 << 20);
    }

    #[test]
    fn a_named_store_has_a_name_for_the_wire() {
        let named: NamedStore = "rack-7=memory:".parse().unwrap();
        assert_eq!((&named.name[..], named.url), ("rack-7", StoreUrl::Memory));
        let long = format!("{}=memory:", "x".repeat(MAX_STORE_NAME + 1));
        for text in ["memory:", "=memory:", "a b=memory:", "a,b=memory:", "ä=memory:", &long] {
            assert_eq!(text.parse::<NamedStore>(), Err(StoreUrlError::BadName), "{text}");
        }
    }

    #[cfg(feature = "redis")]
    #[test]
    fn servers_are_read() {
        let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
        let redis = |text: &str| match parse(text).unwrap_or_else(|error| panic!("{text}: {error}")) {
            StoreUrl::Redis(url) => url,
            other => panic!("{other:?}"),
        };
        let url = redis("redis://10.0.0.7:6380/3");
        assert_eq!((&url.servers[..], url.database, url.cluster), (&[tcp("10.0.0.7", 6380)][..], 3, false));
        assert_eq!((url.user, url.password, url.tls), (None, None, None));
        assert_eq!(redis("redis://[::1]").servers, [tcp("::1", 6379)]);
        let url = redis("redis://:p%40ss@word@host:1");
        assert_eq!((url.user, url.password.as_deref()), (None, Some("p@ss@word")));
        let url = redis("rediss://vm:x@host/0?ca=/a%20b&cert=c&key=k");
        assert_eq!((url.user.as_deref(), url.servers), (Some("vm"), vec![tcp("host", 6379)]));
        let identity = Some(IdentityFiles { certificate: "c".into(), key: "k".into() });
        assert_eq!(url.tls, Some(TlsFiles { ca: Some("/a b".into()), identity }));
        let url = redis("redis+unix:/run/redis.sock?db=2&password=x");
        assert_eq!(url.servers, [Address::Unix("/run/redis.sock".into())]);
        assert_eq!((url.database, url.password.as_deref()), (2, Some("x")));
        let url = redis("redis-cluster://:x@a:1,b:2");
        assert_eq!((&url.servers[..], url.cluster), (&[tcp("a", 1), tcp("b", 2)][..], true));
        assert!(redis("rediss-cluster://a:1").tls.is_some());
    }

    #[cfg(feature = "redis")]
    #[test]
    fn what_is_shown_has_no_password_and_is_a_url() {
        for (text, shown) in [
            ("redis://:secret@h:1/2", "redis://h:1/2"),
            ("rediss://vm:secret@[::1]", "rediss://[::1]:6379"),
            ("redis+unix:/s?db=1&password=secret", "redis+unix:/s?db=1"),
            ("rediss-cluster://:secret@a:1,b:2?ca=x", "rediss-cluster://a:1,b:2"),
        ] {
            let url = parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{url:?}").contains("secret"), "{url:?}");
            assert_eq!(parse(shown).unwrap().to_string(), shown);
        }
    }

    #[cfg(feature = "redis")]
    #[test]
    fn wrong_urls_of_servers_say_what_is_wrong_without_the_password() {
        for text in [
            "redis:host",
            "redis://",
            "redis://:secret@",
            "redis://:secret@host:0",
            "redis://:secret@host:x",
            "redis://:secret@a:1,b:2",
            "redis://:secret@a:1/-1",
            "redis://:secret@a:1/+1",
            "redis://:secret@a:1?ca=x",
            "redis://secret@a:1",
            "redis://:secret%4@a:1",
            "redis://:secret%ff@a:1",
            "rediss://:secret@a:1?cert=x",
            "rediss://:secret@a:1?key=x",
            "rediss://:secret@a:1?ca=x&ca=y",
            "redis-cluster://:secret@a:1/2",
            "redis+unix:",
            "redis+unix:/x?password=secret&pass=secret",
        ] {
            let error = parse(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("secret"), "{text}: {error:?}");
        }
        let many = vec!["h:1"; MAX_SEEDS + 1].join(",");
        assert_eq!(parse(&format!("redis-cluster://{many}")), Err(StoreUrlError::BadServerCount(MAX_SEEDS + 1)));
    }

    #[cfg(not(feature = "redis"))]
    #[test]
    fn servers_need_the_feature() {
        assert_eq!(parse("redis://host"), Err(StoreUrlError::NotBuilt));
    }
}
