//! The requests of clients, and the lines of an answer. Each is a JSON object on a line of its own.

use std::{ffi::OsString, fmt, path::PathBuf, str::FromStr, time::Duration};

use clap::ValueEnum;
use migration_core::{engine::OnTimeout, limits::MAX_ENTRY_STORES, spawner::GuestImpact, working_set::ResidentLimit};
use migration_transport::{Address, Bandwidth};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    encryption::Encryption,
    page_stores::PageStoreOptions,
    values::{self, InvalidValue},
};

/// A request of a client.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// Returns the state of the VM and of a migration.
    Status,
    /// Stops the vCPUs.
    Pause,
    /// Lets the vCPUs run.
    Resume,
    /// Cancels the migration or the snapshot under way.
    Cancel,
    /// Runs the VM that is held here, because its source is dead.
    Adopt,
    /// Ends the process, and the VM with it.
    Quit,
    /// Copies guest RAM to a file. The server writes the file itself, so that memory does not go
    /// through JSON.
    Memory {
        /// The guest physical address.
        gpa: u64,
        /// The number of bytes.
        len: u64,
        /// The path of the file.
        out: PathBuf,
    },
    /// Takes a snapshot.
    Snapshot(SnapshotRequest),
    /// Moves the VM.
    Migrate(Box<MigrateRequest>),
    /// Replaces the VMM while its VM runs.
    Refresh(Plan),
    /// Returns what a borrower must know about the VM's home.
    Place,
    /// From a borrower: requests the guest.
    Lend(LendRequest),
    /// To a borrower: requests the guest for its home.
    GiveBack,
    /// From a borrower: stops the dirty log, which the borrower does not need any more.
    StopLog,
    /// From a borrower: reports that the guest will not come back.
    Gone {
        /// The report of the guest's last migration.
        report: Value,
        /// The exit status with which the home's process ends.
        status: u8,
    },
    /// From a borrower: reports that the guest may run elsewhere from now on, or only at the
    /// borrower.
    Elsewhere {
        /// The address of the destination. `None` if the guest runs only at the borrower.
        to: Option<String>,
    },
    /// From a borrower: reports a complete snapshot.
    Saved {
        /// The snapshot.
        snapshot: Saved,
    },
    /// Switches the migration under way to post-copy.
    PostCopy,
    /// Switches over the migration under way now.
    SwitchOver,
    /// Changes the limits of the migration under way. A limit that is not given stays unchanged.
    Tune {
        /// The bandwidth limit in bits per second; 0 for no limit.
        bandwidth_bits: Option<u64>,
        /// The longest acceptable downtime in microseconds.
        downtime_limit_us: Option<u64>,
    },
    /// Changes how much of the RAM stays resident.
    ResidentLimit {
        /// The limit.
        #[serde(with = "as_text")]
        limit: ResidentLimit,
    },
    /// Reconnects to the destination, and waits for the end of the migration.
    Recover {
        /// The address at which the destination listens.
        #[serde(with = "as_text")]
        to: Address,
        /// Whether the client wants progress.
        progress: bool,
    },
}

/// The options of a snapshot. The server writes the file itself.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SnapshotRequest {
    /// The path of the file.
    pub out: PathBuf,
    /// The longest acceptable pause.
    #[serde(rename = "downtime_limit_us", with = "micros")]
    pub downtime_limit: Duration,
    /// The time after which the guest is paused for as long as the snapshot takes. With zero, the
    /// snapshot continues while further passes shorten the pause.
    #[serde(rename = "timeout_us", with = "micros")]
    pub timeout: Duration,
    /// How much the guest may be disturbed.
    pub impact: Impact,
    /// Whether the client wants progress.
    pub progress: bool,
}

/// The options of a migration.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MigrateRequest {
    /// The address at which the destination listens.
    #[serde(with = "as_text")]
    pub to: Address,
    /// The strategy.
    #[serde(with = "as_text")]
    pub strategy: StrategyKind,
    /// The number of connections for pages.
    pub streams: u16,
    /// The longest acceptable downtime.
    #[serde(rename = "downtime_limit_us", with = "micros")]
    pub downtime_limit: Duration,
    /// The longest time without data from the destination in the pause.
    #[serde(rename = "pause_limit_us", with = "optional_micros", default)]
    pub pause_limit: Option<Duration>,
    /// The longest pause.
    #[serde(rename = "pause_total_us", with = "optional_micros", default)]
    pub pause_total: Option<Duration>,
    /// The bandwidth limit.
    #[serde(rename = "bandwidth_bits", with = "values::bits")]
    pub bandwidth: Bandwidth,
    /// The time limit until the hand-over; zero for no limit.
    #[serde(rename = "timeout_us", with = "micros")]
    pub timeout: Duration,
    /// The action after the time limit.
    pub on_timeout: TimeoutAction,
    /// The longest time until the destination has built the VM. Clients older than this option do
    /// not send it.
    #[serde(rename = "setup_timeout_us", with = "micros", default = "default_setup_timeout")]
    pub setup_timeout: Duration,
    /// The name of the order in which post-copy pushes pages. The server knows the names, because a
    /// program that is built with the library may have orders of its own.
    pub push_order: String,
    /// The number of connections for pages for which the guest waits; 0 excludes post-copy.
    pub demand_lanes: u16,
    /// Whether a fault on a transparent huge page fetches the whole huge page.
    pub whole_huge_pages: bool,
    /// The protection of the VM in post-copy.
    pub fail_safe: Option<Protect>,
    /// How much the guest may be disturbed.
    pub impact: Impact,
    /// Whether page data has a checksum of its own.
    pub checksum: bool,
    /// The encryption. The server reads the keys.
    pub encryption: Encryption,
    /// The page stores through which pages go. Clients older than this option do not send it.
    #[serde(default)]
    pub page_stores: PageStoreOptions,
    /// Whether the client wants progress.
    pub progress: bool,
}

/// Returns the value for a request of a client that does not know the option.
fn default_setup_timeout() -> Duration {
    Duration::from_secs(60)
}

impl MigrateRequest {
    /// Returns a request without limits or choices, and without encryption.
    pub fn plain(to: Address, strategy: StrategyKind, streams: u16) -> Self {
        Self {
            to,
            strategy,
            streams,
            downtime_limit: Duration::from_millis(300),
            pause_limit: None,
            pause_total: None,
            bandwidth: Bandwidth::from_bits_per_second(0),
            timeout: Duration::ZERO,
            on_timeout: TimeoutAction::Cancel,
            setup_timeout: default_setup_timeout(),
            push_order: "linear".into(),
            demand_lanes: 0,
            whole_huge_pages: false,
            impact: Impact::Balanced,
            fail_safe: None,
            checksum: false,
            encryption: Encryption::default(),
            page_stores: PageStoreOptions::default(),
            progress: false,
        }
    }
}

/// A strategy as users write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StrategyKind {
    /// Pre-copy: pages are sent in rounds while the guest runs.
    PreCopy,
    /// Stop-and-copy: the guest is paused while everything is sent.
    StopAndCopy,
    /// Post-copy: the guest moves first, and its pages follow.
    PostCopy,
    /// Rounds of pre-copy, then post-copy.
    Hybrid {
        /// The number of rounds.
        rounds: u32,
    },
    /// A hand-over to a process of this host, which takes over the RAM in place.
    HandOver,
    /// One round of the resident pages, then post-copy. Pages in a page store stay there.
    Agile,
    /// Post-copy whose pages also go through page stores, so that the source is free soon.
    ScatterGather {
        /// The number of stores that get each page.
        replicas: usize,
    },
}

impl FromStr for StrategyKind {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let rounds = |text: &str| {
            let rounds = text.strip_prefix("rounds=").and_then(|n| n.parse().ok()).filter(|n| (1..=100).contains(n));
            rounds.ok_or_else(|| InvalidValue::new(format!("{text}: rounds=1 to rounds=100 is meant")))
        };
        let replicas = |text: &str| {
            let count = text.strip_prefix("replicas=").and_then(|n| n.parse().ok());
            count
                .filter(|count| (1..=MAX_ENTRY_STORES).contains(count))
                .ok_or_else(|| InvalidValue::new(format!("{text}: replicas=1 to replicas={MAX_ENTRY_STORES} is meant")))
        };
        match text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest))) {
            ("pre-copy", None) => Ok(Self::PreCopy),
            ("stop-and-copy", None) => Ok(Self::StopAndCopy),
            ("post-copy", None) => Ok(Self::PostCopy),
            ("handover", None) => Ok(Self::HandOver),
            ("agile", None) => Ok(Self::Agile),
            ("hybrid", None) => Ok(Self::Hybrid { rounds: 1 }),
            ("hybrid", Some(rest)) => Ok(Self::Hybrid { rounds: rounds(rest)? }),
            ("scatter-gather", None) => Ok(Self::ScatterGather { replicas: 1 }),
            ("scatter-gather", Some(rest)) => Ok(Self::ScatterGather { replicas: replicas(rest)? }),
            _ => Err(InvalidValue::new(
                "pre-copy, stop-and-copy, post-copy, hybrid[:rounds=N], scatter-gather[:replicas=N], agile or handover is \
                 meant"
                    .into(),
            )),
        }
    }
}

impl fmt::Display for StrategyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PreCopy => f.write_str("pre-copy"),
            Self::StopAndCopy => f.write_str("stop-and-copy"),
            Self::PostCopy => f.write_str("post-copy"),
            Self::HandOver => f.write_str("handover"),
            Self::Agile => f.write_str("agile"),
            Self::Hybrid { rounds } => write!(f, "hybrid:rounds={rounds}"),
            Self::ScatterGather { replicas } => write!(f, "scatter-gather:replicas={replicas}"),
        }
    }
}

/// The protection of a VM in post-copy.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Protect {
    /// Whether the VM is protected against the death of its destination.
    pub reverse: bool,
    /// Whether the VM is protected against the death of its source.
    pub forward: bool,
    /// The time from one checkpoint to the next, in microseconds.
    pub interval_us: u64,
    /// The time without a link after which the other side counts as dead, in microseconds.
    pub detect_us: u64,
    /// The folder for checkpoints. For forward checkpoints, the destination must have the folder,
    /// too. `None` keeps checkpoints in memory.
    pub dir: Option<PathBuf>,
}

/// The action when a migration takes longer than its time limit.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TimeoutAction {
    /// The migration is cancelled.
    Cancel,
    /// The guest is paused, and everything left is sent.
    Stop,
    /// The migration becomes a post-copy.
    PostCopy,
}

impl From<TimeoutAction> for OnTimeout {
    fn from(action: TimeoutAction) -> Self {
        match action {
            TimeoutAction::Cancel => OnTimeout::Cancel,
            TimeoutAction::Stop => OnTimeout::Stop,
            TimeoutAction::PostCopy => OnTimeout::PostCopy,
        }
    }
}

/// How much a guest may be disturbed.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Impact {
    /// As little as possible.
    Low,
    /// As much as the migration needs in order to end.
    Balanced,
    /// As much as makes the migration short.
    Fast,
}

impl Impact {
    /// Returns the name of the value in requests and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Balanced => "balanced",
            Self::Fast => "fast",
        }
    }
}

impl From<Impact> for GuestImpact {
    fn from(impact: Impact) -> Self {
        match impact {
            Impact::Low => GuestImpact::Low,
            Impact::Balanced => GuestImpact::Balanced,
            Impact::Fast => GuestImpact::Fast,
        }
    }
}

/// The request of a borrower to a VM's home.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LendRequest {
    /// The address at which the borrower waits for the guest.
    pub to: String,
    /// The control socket of the borrower.
    pub control: PathBuf,
    /// The identity of the process that the request is for, because another process may be at the
    /// control socket by now. `None` from builds that do not send it.
    #[serde(default)]
    pub lender: Option<Vec<u8>>,
    /// The identity of the borrower: an encoded `ProcessIdentity`.
    pub borrower: Vec<u8>,
    /// The process ID of the borrower.
    pub pid: u32,
    /// The time in microseconds within which the borrower intends to give the guest back. After
    /// this time, the home requests the guest.
    pub within_us: u64,
}

/// The condition on which a VM gets a new VMM.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    /// Repeatedly, at this interval in microseconds.
    Every(u64),
    /// When the VMM's own memory exceeds this number of bytes.
    Memory(u64),
}

impl FromStr for Trigger {
    type Err = InvalidValue;

    /// Parses the form of `--when rss>500M`.
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let limit = text.strip_prefix("rss>");
        let limit = limit.ok_or_else(|| InvalidValue::new("rss>SIZE is meant, such as rss>500M".into()))?;
        values::size(limit.trim()).map(Self::Memory)
    }
}

/// How and when a VMM is replaced.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Plan {
    /// The program of the successor. `None` for the program of this process.
    pub exec: Option<PathBuf>,
    /// The condition, with which the successor continues. `None` replaces the VMM now.
    pub trigger: Option<Trigger>,
}

/// A snapshot from which a VM can be restarted.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(from = "Written", into = "Written")]
pub struct Saved {
    /// The path of the snapshot.
    pub file: PathBuf,
    /// The file with the key that seals the snapshot, if it is sealed.
    pub key: Option<PathBuf>,
}

/// The encoded form of [`Saved`]. A snapshot that is not sealed has the form of other builds, which
/// know no sealed ones.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Written {
    Plain(PathBuf),
    Sealed { file: PathBuf, key: PathBuf },
}

impl From<Written> for Saved {
    fn from(written: Written) -> Self {
        match written {
            Written::Plain(file) => Self { file, key: None },
            Written::Sealed { file, key } => Self { file, key: Some(key) },
        }
    }
}

impl From<Saved> for Written {
    fn from(Saved { file, key }: Saved) -> Self {
        match key {
            None => Self::Plain(file),
            Some(key) => Self::Sealed { file, key },
        }
    }
}

impl Saved {
    /// Returns the snapshot as an argument: an absolute path, or JSON.
    ///
    /// # Errors
    /// Returns an error if a path is not Unicode, which JSON cannot carry.
    pub fn argument(&self) -> Result<OsString, serde_json::Error> {
        match &self.key {
            None => Ok(self.file.clone().into()),
            Some(_) => serde_json::to_string(self).map(Into::into),
        }
    }
}

impl FromStr for Saved {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.starts_with('{') {
            true => serde_json::from_str(text),
            false => Ok(Self { file: text.into(), key: None }),
        }
    }
}

/// The wishes of a client about the answer to its request. A server ignores wishes that it does not
/// know.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Wishes {
    /// Whether the client of a request that takes long wants signs of life.
    #[serde(default)]
    pub alive: bool,
}

impl Request {
    /// Returns whether the request may take long, because it waits for a guest or copies memory.
    /// The server then sends signs of life.
    pub fn takes_long(&self) -> bool {
        !matches!(
            self,
            Self::Status | Self::Adopt | Self::Quit | Self::Tune { .. } | Self::Place | Self::ResidentLimit { .. }
        )
    }

    /// Returns the line of this request. With `alive`, the line contains the wish for signs of
    /// life.
    ///
    /// # Errors
    /// Returns an error if a path is not Unicode, which JSON cannot carry.
    pub(crate) fn line(&self, alive: bool) -> Result<Vec<u8>, serde_json::Error> {
        let mut request = serde_json::to_value(self)?;
        if alive {
            request["alive"] = Value::Bool(true);
        }
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// A line of an answer.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The progress of a migration. More lines follow.
    Progress(Value),
    /// A sign that the server works on the request. More lines follow. Sent only to a client that
    /// has [asked](Wishes::alive) for it, because other clients do not know this line.
    Alive,
    /// The result. This is the last line.
    Done(Value),
    /// The reason of a failure. This is the last line.
    Failed(String),
}

/// Encodes a value as the text that command lines contain.
mod as_text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let text = String::deserialize(from)?;
        text.parse().map_err(|e| D::Error::custom(format_args!("{text}: {e}")))
    }
}

/// Encodes a time as whole microseconds.
mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(crate::values::micros(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_micros)
    }
}

/// Encodes a time as whole microseconds, or as null.
mod optional_micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        time.map(crate::values::micros).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Duration::from_micros))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn migrate() -> MigrateRequest {
        MigrateRequest::plain("unix:/x".parse().unwrap(), StrategyKind::Hybrid { rounds: 3 }, 3)
    }

    /// Returns one request of each kind that takes long.
    fn requests() -> Vec<Request> {
        let snapshot = SnapshotRequest {
            out: "s".into(),
            downtime_limit: Duration::from_micros(1),
            timeout: Duration::from_micros(2),
            impact: Impact::Low,
            progress: true,
        };
        let saved = Saved { file: "s".into(), key: Some("k".into()) };
        vec![
            Request::Pause,
            Request::Cancel,
            Request::Snapshot(snapshot),
            Request::Migrate(Box::new(migrate())),
            Request::Refresh(Plan::default()),
            Request::Gone { report: json!({"outcome": "lost"}), status: 5 },
            Request::Elsewhere { to: None },
            Request::Saved { snapshot: saved },
            Request::Recover { to: "unix:/x".parse().unwrap(), progress: false },
        ]
    }

    #[test]
    fn a_server_that_does_not_know_signs_of_life_understands_who_asks_for_them() {
        for request in requests() {
            assert!(request.takes_long());
            let line = request.line(true).unwrap();
            let value: Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(value["alive"], true);
            // this is how an earlier server reads the line
            let read: Request = serde_json::from_slice(&line).unwrap();
            assert_eq!(format!("{read:?}"), format!("{request:?}"));
            assert!(serde_json::from_slice::<Wishes>(&line).unwrap().alive);
        }
    }

    #[test]
    fn a_client_that_does_not_ask_gets_no_signs_of_life() {
        for request in requests() {
            let line = request.line(false).unwrap();
            let value: Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(value, serde_json::to_value(&request).unwrap());
            assert!(!serde_json::from_slice::<Wishes>(&line).unwrap().alive);
        }
    }

    #[test]
    fn a_migration_is_written_in_text_and_plain_numbers() {
        let mut request = migrate();
        request.pause_limit = Some(Duration::from_millis(2));
        let json = serde_json::to_value(Request::Migrate(Box::new(request))).unwrap();
        let encryption = json["encryption"].clone();
        let expected = json!({
            "command": "migrate", "to": "unix:/x", "strategy": "hybrid:rounds=3", "streams": 3,
            "downtime_limit_us": 300_000, "pause_limit_us": 2000, "pause_total_us": null, "bandwidth_bits": 0,
            "timeout_us": 0, "on_timeout": "cancel", "setup_timeout_us": 60_000_000, "push_order": "linear",
            "demand_lanes": 0, "whole_huge_pages": false, "fail_safe": null, "impact": "balanced", "checksum": false,
            "encryption": encryption, "page_stores": {"stores": [], "through": [], "gather_rate_bits": 0},
            "progress": false,
        });
        assert_eq!(json, expected);
        // this is how a client older than some options writes it
        let mut earlier = expected;
        let fields = earlier.as_object_mut().unwrap();
        for field in ["setup_timeout_us", "pause_limit_us", "pause_total_us", "page_stores"] {
            fields.remove(field);
        }
        let Request::Migrate(read) = serde_json::from_value(earlier.clone()).unwrap() else { panic!("{earlier}") };
        assert_eq!((read.setup_timeout, read.pause_limit), (Duration::from_secs(60), None));
        assert_eq!(read.page_stores, PageStoreOptions::default());
        earlier["strategy"] = json!("teleport");
        let error = serde_json::from_value::<Request>(earlier).unwrap_err().to_string();
        assert!(error.contains("teleport") && error.contains("pre-copy"), "{error}");
    }

    #[test]
    fn strategies_are_parsed_and_written() {
        for text in ["pre-copy", "handover", "agile", "hybrid:rounds=3", "scatter-gather:replicas=2"] {
            assert_eq!(text.parse::<StrategyKind>().unwrap().to_string(), text);
        }
        assert_eq!("scatter-gather".parse(), Ok(StrategyKind::ScatterGather { replicas: 1 }));
        for bad in ["scatter-gather:replicas=0", "scatter-gather:replicas=9", "scatter-gather:k=1", "hybrid:rounds=0"] {
            assert!(bad.parse::<StrategyKind>().is_err(), "{bad}");
        }
    }

    #[test]
    fn snapshots_as_other_processes_write_them() {
        let plain = Saved { file: "/s".into(), key: None };
        let sealed = Saved { key: Some("/k".into()), ..plain.clone() };
        assert_eq!(serde_json::to_string(&plain).unwrap(), "\"/s\"");
        for saved in [plain, sealed] {
            assert_eq!(serde_json::from_str::<Saved>(&serde_json::to_string(&saved).unwrap()).unwrap(), saved);
            assert_eq!(saved.argument().unwrap().to_str().unwrap().parse::<Saved>().unwrap(), saved);
        }
    }
}
