//! Errors of all crates: a cause is in the chain, and no text repeats it.

use std::{
    error::Error,
    fs, io, iter,
    path::{Path, PathBuf},
    time::Duration,
};

use migration_core::{
    MigrationError, PageRange,
    codec::DecodeError,
    engine::{AttemptError, ReceiveError},
    fence::{LeaseError, NotFenced},
    paged_memory::{FetchError, PutError},
    patience::StillHeld,
    store::StoreError,
    text::describe,
    tracker::TrackerError,
    vm::VmError,
};
use migration_crypto::{HandshakeError, KeyError};
use migration_kvm::{
    fence::TakeOverError,
    handover::ReplaceError,
    pager::{EvictionError, PagerError},
    ram::{RamError, VmMemoryError},
    state::StateError,
    successor::SuccessorError,
    swapper::SwapperError,
};
use migration_transport::{BrokerError, supervisor::NotRestarted};

/// The words of the cause of every sample.
const CAUSE: &str = "the disk is full";

fn disk() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, CAUSE)
}

fn boxed() -> Box<dyn Error + Send + Sync> {
    disk().into()
}

fn malformed() -> DecodeError {
    DecodeError::invalid("length", CAUSE)
}

/// A public error with a cause.
struct Sample {
    /// The name of its type.
    of: &'static str,
    error: Box<dyn Error>,
}

fn sample(of: &'static str, error: impl Error + 'static) -> Sample {
    Sample { of, error: Box::new(error) }
}

fn core() -> Vec<Sample> {
    let migration = |error: MigrationError| sample("MigrationError", error);
    let waited = Duration::from_secs(1);
    let held = StillHeld::new("a buffer", PageRange::new(0, 1), waited, iter::empty(), Some(disk()));
    vec![
        migration(MigrationError::link("tcp:there:1")(disk())),
        migration(MigrationError::Store { step: "writing", cause: disk() }),
        migration(MigrationError::Thread { role: "a lane", cause: disk() }),
        migration(MigrationError::vm("saving the state")(VmError::because("the disk image", disk()))),
        migration(MigrationError::vm("saving the state")(VmError::new(CAUSE))),
        migration(malformed().into()),
        migration(TrackerError::because("dirty-log", "read the log", disk()).into()),
        migration(MigrationError::page_store("rack-7")(StoreError::io("writing")(disk()))),
        sample("VmError", VmError::because("saving", disk())),
        sample("TrackerError", TrackerError::because("dirty-log", "read the log", disk())),
        sample("StoreError", StoreError::io("reading")(disk())),
        sample(
            "FetchError",
            FetchError::Silent { entry: 1, first: 2, store: "rack-7".into(), cause: StoreError::io("reading")(disk()) },
        ),
        sample("FetchError", FetchError::Install { first: 2, cause: disk() }),
        sample("PutError", PutError::Store { store: "rack-7".into(), cause: StoreError::io("writing")(disk()) }),
        sample("StoreError", StoreError::Seal { page: 1, cause: boxed() }),
        sample("StoreError", StoreError::Damaged { what: "the table".into(), cause: boxed() }),
        sample("LeaseError", LeaseError::from(disk())),
        sample("LeaseError", LeaseError::Expired { why: "the store failed".into(), cause: Some(disk()) }),
        sample("ReceiveError", ReceiveError::from(disk())),
        sample("AttemptError", AttemptError::from(disk())),
        sample("StillHeld", held),
    ]
}

fn other_crates() -> Vec<Sample> {
    let failed = RamError::System { what: "map it", source: disk() };
    vec![
        sample("StateError", StateError::Ioctl { what: "KVM_GET_REGS", source: disk() }),
        sample("StateError", StateError::from(malformed())),
        sample("PagerError", PagerError::from(disk())),
        sample("PagerError", PagerError::from(failed)),
        sample("EvictionError", EvictionError::SideArea(boxed())),
        sample("SwapperError", SwapperError::Populated(disk())),
        sample("SwapperError", SwapperError::from(EvictionError::SideArea(boxed()))),
        sample("RamError", RamError::System { what: "map it", source: disk() }),
        sample("VmMemoryError", VmMemoryError::Pagemap(disk())),
        sample("SuccessorError", SuccessorError::Start { program: "/vmm".into(), cause: disk() }),
        sample("SuccessorError", SuccessorError::Endpoint { path: "/control".into(), cause: disk() }),
        sample("SuccessorError", SuccessorError::Identity { process: "this process", cause: disk() }),
        sample("ReplaceError", ReplaceError::NoThread(disk())),
        sample("TakeOverError", TakeOverError::from(NotFenced(CAUSE.into()))),
        sample("NotRestarted", NotRestarted::Record(VmError::new(CAUSE))),
        sample("NotRestarted", NotRestarted::Start(disk())),
        sample("NotRestarted", NotRestarted::NoThread(disk())),
        sample("BrokerError", BrokerError::Link { path: "/broker".into(), cause: disk() }),
        sample("BrokerError", BrokerError::from(malformed())),
        sample("HandshakeError", HandshakeError::Tls(boxed())),
        sample("HandshakeError", HandshakeError::Crypto(boxed())),
        sample("HandshakeError", HandshakeError::from(disk())),
        sample("KeyError", KeyError::File { path: "/key".into(), cause: disk() }),
        sample("KeyError", KeyError::Certificate { path: "/key".into(), cause: boxed() }),
        sample("KeyError", KeyError::Random(boxed())),
    ]
}

#[test]
fn every_cause_is_printed_once() {
    for Sample { of, error } in core().into_iter().chain(other_crates()) {
        let text = describe(&*error);
        assert_eq!(text.matches(CAUSE).count(), 1, "{of}: {text}");
        let mut next: &dyn Error = &*error;
        while let Some(cause) = next.source() {
            assert!(!next.to_string().contains(&cause.to_string()), "{of} repeats its cause: {next}");
            next = cause;
        }
    }
}

/// Types that only their own crate can make; a test beside the type checks them.
const MADE_INSIDE: [&str; 2] = ["SideAreaError", "UserFaultError"];

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// Returns the public error types of a source file that can have a cause.
fn types_with_cause(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut derives = false;
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let manual = line.strip_prefix("impl Error for ").and_then(|rest| rest.strip_suffix(" {"));
        let derived =
            ["pub struct ", "pub enum "].iter().find_map(|start| line.strip_prefix(start)).filter(|_| derives);
        if let Some(name) = manual.or(derived) {
            let name = name.split(|c: char| !c.is_alphanumeric()).next().unwrap_or(name);
            let body: Vec<&str> = match line.ends_with('{') {
                true => lines.by_ref().take_while(|line| *line != "}").collect(),
                false => vec![line],
            };
            let has_cause =
                |line: &&str| ["#[source]", "#[from]", "source:", "fn source"].iter().any(|word| line.contains(word));
            if body.iter().any(has_cause) {
                found.push(name.to_owned());
            }
        }
        derives = match line.strip_prefix("#[derive(") {
            Some(list) => list.split([',', ')']).any(|name| name.trim() == "Error"),
            None => derives && line.starts_with("#["),
        };
    }
    found
}

#[test]
fn every_error_type_with_a_cause_is_sampled() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let sampled: Vec<&str> = core().iter().chain(&other_crates()).map(|sample| sample.of).chain(MADE_INSIDE).collect();
    let mut types = 0;
    for name in ["migration-core", "migration-kvm", "migration-transport", "migration-crypto"] {
        let mut files = Vec::new();
        sources(&workspace.join(name).join("src"), &mut files);
        for file in files {
            for of in types_with_cause(&fs::read_to_string(&file).unwrap()) {
                assert!(sampled.contains(&&*of), "no sample of {of} in {}", file.display());
                types += 1;
            }
        }
    }
    assert!(types > 10, "only {types} error types were found");
}
