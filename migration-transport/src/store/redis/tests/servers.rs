//! Servers that tests start: alone, with TLS, and as a cluster.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use redis::{Cmd, ConnectionLike, FromRedisValue, Value};
use tempfile::TempDir;

use crate::{
    Address,
    store::{
        redis::{
            connection::{Settings, Wait},
            tls,
        },
        url::{IdentityFiles, RedisUrl, TlsFiles},
    },
};

/// Ends the server when the standard input ends: with the [`Server`], or with this process.
const KEEPER: &str = r#""$@" </dev/null >log 2>&1 & echo $!; cat >/dev/null; kill -9 $!; wait"#;
/// Masters of a cluster.
pub(super) const MASTERS: usize = 3;

pub(super) fn wait() -> Wait {
    Wait::silence(Duration::from_secs(60))
}

/// Says why a test does nothing, or fails where it must not be skipped.
fn skip(why: &str) {
    let required = env::var_os("MIGRATION_REQUIRE_REDIS").is_some_and(|value| value == "1");
    assert!(!required, "{why}, and MIGRATION_REQUIRE_REDIS=1");
    eprintln!("skipped: {why}");
}

/// Returns the name of the server program.
fn program() -> Option<&'static str> {
    static FOUND: OnceLock<Option<&'static str>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let runs = |name: &&str| Command::new(name).arg("--version").stdout(Stdio::null()).status().is_ok();
        ["redis-server", "valkey-server"].into_iter().find(runs)
    });
    if found.is_none() {
        skip("neither redis-server nor valkey-server is installed");
    }
    *found
}

/// A server in a folder of its own. It ends with this.
pub(super) struct Server {
    dir: TempDir,
    keeper: Child,
    input: Option<ChildStdin>,
    pub(super) pid: i32,
    address: Address,
    tls: Option<TlsFiles>,
}

impl Server {
    /// Starts a server on a Unix socket; `None` if there is none on this host.
    pub(super) fn start(args: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listen = [OsStr::new("--port"), OsStr::new("0"), OsStr::new("--unixsocket"), socket.as_os_str()];
        let args = listen.into_iter().chain(args.iter().map(OsStr::new));
        Self::spawn(dir, Address::Unix(socket.clone()), args)
    }

    fn spawn<'a>(dir: TempDir, address: Address, args: impl Iterator<Item = &'a OsStr>) -> Option<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "sh", program()?, "--save", "", "--appendonly", "no"]).args(args);
        command.current_dir(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut keeper = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let input = keeper.stdin.take();
        Some(Self { dir, keeper, input, pid: line.trim().parse().unwrap(), address, tls: None })
    }

    /// Starts a server with TLS that asks its clients for a certificate; `None` if there is none on
    /// this host, or it knows no TLS.
    pub(super) fn start_with_tls() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        write_certificates(dir.path());
        let (port, _) = free_ports();
        let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
        let args = [
            ["--port", "0"],
            ["--tls-port", &port],
            ["--bind", "127.0.0.1"],
            ["--tls-ca-cert-file", &ca],
            ["--tls-cert-file", &cert],
            ["--tls-key-file", &key],
        ];
        let address = Address::Tcp { host: "127.0.0.1".into(), port: port.parse().unwrap() };
        let mut server = Self::spawn(dir, address, args.as_flattened().iter().map(OsStr::new))?;
        let identity = Some(IdentityFiles { certificate: cert.into(), key: key.into() });
        server.tls = Some(TlsFiles { ca: Some(ca.into()), identity });
        // a server that knows no TLS says so in its log, and ends
        let deadline = Instant::now() + Duration::from_secs(60);
        while server.connect().is_none() {
            if fs::read_to_string(server.file("log")).is_ok_and(|log| log.contains("Bad directive")) {
                skip("the server was built without TLS");
                return None;
            }
            assert!(Instant::now() < deadline, "the server does not start: {}", server.log());
            thread::sleep(Duration::from_millis(5));
        }
        Some(server)
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    pub(super) fn url(&self) -> RedisUrl {
        RedisUrl {
            servers: vec![self.address.clone()],
            cluster: false,
            database: 0,
            user: None,
            password: None,
            tls: self.tls.clone(),
        }
    }

    fn connect(&self) -> Option<redis::Connection> {
        let tls = self.tls.as_ref().map(|files| tls::certificates(files).unwrap());
        let settings = Settings { user: None, password: None, database: 0, tls, cluster: false };
        let mut connection = settings.connect(&self.address, wait().left()).ok()?;
        // that TLS works, and that the socket is not connected to itself
        connection.check_connection().then_some(connection)
    }

    /// Waits until the server answers, and asks it.
    pub(super) fn ask<T: FromRedisValue>(&self, command: &Cmd) -> T {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            // a server that reads its configuration answers with an error
            if let Some(Ok(answer)) = self.connect().map(|mut connection| command.query(&mut connection)) {
                return answer;
            }
            assert!(Instant::now() < deadline, "the server does not answer: {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the server, and waits until it is dead.
    pub(super) fn kill(&mut self) {
        self.input = None;
        self.keeper.wait().unwrap();
    }

    /// Starts the server again, on the same socket.
    pub(super) fn start_again(&mut self) {
        self.kill();
        let socket = self.file("socket");
        let listen = [OsStr::new("--port"), OsStr::new("0"), OsStr::new("--unixsocket"), socket.as_os_str()];
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        *self = Self::spawn(dir, self.address.clone(), listen.into_iter()).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Returns two free ports, as texts. Another process can take them before the server does.
fn free_ports() -> (String, String) {
    let free = || TcpListener::bind("127.0.0.1:0").unwrap();
    let (one, other) = (free(), free());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port().to_string();
    (port(&one), port(&other))
}

/// Writes an authority, and a certificate for 127.0.0.1 that it has issued.
fn write_certificates(dir: &Path) {
    let mut authority = CertificateParams::default();
    // a certificate whose issuer has its own name counts as self-signed
    authority.distinguished_name.push(DnType::CommonName, "authority of the tests");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    fs::write(dir.join("cert.pem"), params.signed_by(&key, &authority).unwrap().pem()).unwrap();
    fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
}

/// Three masters with equal shares of the slots.
pub(super) struct Cluster(pub(super) Vec<Server>);

impl Cluster {
    /// Starts a cluster, which takes some seconds; `None` if there is no server on this host.
    pub(super) fn start() -> Option<Self> {
        let masters = (0..MASTERS).map(|_| {
            let (port, bus) = free_ports();
            let args = [
                ["--port", &port],
                ["--cluster-port", &bus],
                ["--bind", "127.0.0.1"],
                ["--cluster-enabled", "yes"],
                ["--cluster-node-timeout", "60000"],
                ["--cluster-require-full-coverage", "no"],
            ];
            let address = Address::Tcp { host: "127.0.0.1".into(), port: port.parse().unwrap() };
            let server =
                Server::spawn(tempfile::tempdir().unwrap(), address, args.as_flattened().iter().map(OsStr::new))?;
            Some((server, port, bus))
        });
        let masters: Vec<_> = masters.collect::<Option<_>>()?;
        for (at, (server, ..)) in masters.iter().enumerate() {
            let first = at * 16_384 / MASTERS;
            let last = (at + 1) * 16_384 / MASTERS - 1;
            server.ask::<()>(cluster("ADDSLOTSRANGE").arg(first).arg(last));
            server.ask::<()>(cluster("SET-CONFIG-EPOCH").arg(at + 1));
        }
        let (first, others) = masters.split_first().unwrap();
        for (_, port, bus) in others {
            first.0.ask::<()>(cluster("MEET").arg("127.0.0.1").arg(port).arg(bus));
        }
        let this = Self(masters.into_iter().map(|(server, ..)| server).collect());
        let deadline = Instant::now() + Duration::from_secs(60);
        while !this.0.iter().all(Self::is_ready) {
            assert!(Instant::now() < deadline, "the cluster does not come together: {}", this.0[0].log());
            thread::sleep(Duration::from_millis(20));
        }
        Some(this)
    }

    /// Returns the cluster that all conformance tests share. Each has a prefix of its own.
    pub(super) fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Cluster>> = OnceLock::new();
        SHARED.get_or_init(Self::start).as_ref()
    }

    /// Returns whether a master knows all slots, and serves its own.
    fn is_ready(server: &Server) -> bool {
        let info: String = server.ask(&cluster("INFO"));
        let slots: Vec<Value> = server.ask(&cluster("SLOTS"));
        slots.len() == MASTERS && info.contains("cluster_state:ok")
    }

    pub(super) fn url(&self) -> RedisUrl {
        // the first one tells of the others
        RedisUrl { cluster: true, ..self.0[0].url() }
    }
}

/// Begins a command of a cluster.
pub(super) fn cluster(what: &str) -> Cmd {
    redis::cmd("CLUSTER").arg(what).take()
}
