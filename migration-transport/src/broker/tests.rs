use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{
        fd::BorrowedFd,
        unix::{fs::FileExt as _, net::UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use migration_core::RamRegion;
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{message::Message, *};
use crate::{SocketOptions, UnixListener};

struct Lab {
    broker: Arc<RamBroker>,
    client: BrokerClient,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _dir: TempDir,
}

impl Lab {
    fn new(options: BrokerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broker");
        let mut listener = UnixListener::bind(&path, SocketOptions::default()).unwrap();
        let (broker, stop) = (RamBroker::new(options), Arc::new(AtomicBool::new(false)));
        let (serving, stopped) = (broker.clone(), stop.clone());
        let thread = Some(thread::spawn(move || serving.serve(&mut listener, &stopped).unwrap()));
        Self { broker, client: BrokerClient::new(path), stop, thread, _dir: dir }
    }

    /// Looks until the broker keeps what is wished.
    fn wait(&self, wished: impl Fn(&[RetainedRam]) -> bool) {
        while !wished(&self.broker.list()) {
            thread::yield_now();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

fn layout() -> RamLayout {
    RamLayout::new(vec![RamRegion { gpa: 0, len: 0x3000 }, RamRegion { gpa: 0x10_0000, len: 0x1000 }]).unwrap()
}

fn file(len: u64, seals: SealFlag) -> OwnedFd {
    let file = memfd_create(c"t", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&file, len as i64).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

fn files() -> Vec<OwnedFd> {
    [0x3000, 0x1000].map(|len| file(len, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)).into()
}

fn borrowed(files: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}

fn lease(client: &BrokerClient, id: u8, text: &[u8]) -> RamLease {
    try_lease(client, id, text).unwrap()
}

fn try_lease(client: &BrokerClient, id: u8, text: &[u8]) -> Result<RamLease, BrokerError> {
    let files = files();
    let lease = client.lease(VmId([id; 16]), &layout(), "memfd", &borrowed(&files))?;
    // after it was leased: it is the same memory
    File::from(files.into_iter().next().unwrap()).write_all(text).unwrap();
    Ok(lease)
}

fn text(ram: RetrievedRam) -> Vec<u8> {
    let mut text = vec![0; 3];
    File::from(ram.files.into_iter().next().unwrap()).read_exact_at(&mut text, 0).unwrap();
    text
}

#[test]
fn ram_outlives_its_owner_and_no_more_than_that() {
    let lab = Lab::new(BrokerOptions::default());
    assert_eq!(lab.client.list().unwrap(), []);
    let one = lease(&lab.client, 1, b"one");
    let two = lease(&lab.client, 2, b"two");
    let kept = |id, owned| RetainedRam {
        id: VmId([id; 16]),
        bytes: 0x4000,
        label: "memfd".into(),
        pid: std::process::id(),
        owned,
    };
    assert_eq!(lab.client.list().unwrap(), [kept(1, true), kept(2, true)]);
    let error = lab.client.forget(VmId([1; 16])).unwrap_err();
    assert!(error.to_string().contains("lives"), "{error}");
    // the owner of one dies, that of the other ends
    drop(one);
    two.release().unwrap();
    lab.wait(|list| list == [kept(1, false)]);
    let ram = lab.client.retrieve(VmId([1; 16])).unwrap();
    assert_eq!((&ram.layout, ram.label.as_str()), (&layout(), "memfd"));
    assert_eq!(text(ram), b"one");
    assert_eq!(text(lab.client.retrieve(VmId([1; 16])).unwrap()), b"one");
    lab.client.forget(VmId([1; 16])).unwrap();
    assert!(matches!(lab.client.retrieve(VmId([1; 16])), Err(BrokerError::Refused(_))));
    assert!(matches!(lab.client.forget(VmId([1; 16])), Err(BrokerError::Refused(_))));
    assert_eq!(lab.client.list().unwrap(), []);
}

/// A VM that moved to another VMM is that one's, whenever the first one ends and however.
#[test]
fn the_last_lease_of_a_vm_counts() {
    let lab = Lab::new(BrokerOptions::default());
    for ends_well in [false, true] {
        let source = lease(&lab.client, 1, b"old");
        let destination = lease(&lab.client, 1, b"new");
        if ends_well {
            source.release().unwrap();
        } else {
            drop(source);
        }
        assert!(matches!(lab.client.list().unwrap()[..], [RetainedRam { owned: true, .. }]));
        assert_eq!(text(lab.client.retrieve(VmId([1; 16])).unwrap()), b"new");
        destination.release().unwrap();
        assert_eq!(lab.client.list().unwrap(), []);
    }
}

/// Whoever is told of lost VMs, and of what.
#[derive(Default)]
struct Told(Mutex<Vec<(VmId, Vec<u8>)>>);

impl OwnerGone for Told {
    fn owner_gone(&self, ram: &RetainedRam, metadata: &[u8]) {
        assert!(!ram.owned);
        self.0.lock().unwrap().push((ram.id, metadata.to_vec()));
    }
}

#[test]
fn the_metadata_of_a_vm_goes_from_owner_to_owner() {
    let told = Arc::new(Told::default());
    let lab = Lab::new(BrokerOptions { owner_gone: Some(told.clone()), ..BrokerOptions::default() });
    let first = lease(&lab.client, 1, b"one");
    assert_eq!(first.previous_metadata(), b"");
    first.set_metadata(b"a").unwrap();
    first.set_metadata(b"b").unwrap();
    assert!(matches!(first.set_metadata(&[0; (16 << 10) + 1]), Err(BrokerError::Refused(_))));
    let second = lease(&lab.client, 1, b"one");
    assert_eq!(second.previous_metadata(), b"b");
    // it has nothing to say any more, and nobody mourns it
    assert!(matches!(first.set_metadata(b"c"), Err(BrokerError::Refused(_))));
    drop(first);
    second.set_metadata(&[7; 16 << 10]).unwrap();
    let third = lease(&lab.client, 1, b"one");
    assert_eq!(third.previous_metadata(), [7; 16 << 10]);
    third.set_metadata(b"d").unwrap();
    drop((second, third));
    lab.wait(|list| matches!(list, [RetainedRam { owned: false, .. }]));
    let wait_told = |count| {
        while told.0.lock().unwrap().len() < count {
            thread::yield_now();
        }
    };
    wait_told(1);
    // one that ends in order takes its metadata along
    let last = lease(&lab.client, 2, b"two");
    last.set_metadata(b"e").unwrap();
    last.release().unwrap();
    assert_eq!(lease(&lab.client, 2, b"two").previous_metadata(), b"");
    wait_told(2);
    assert_eq!(*told.0.lock().unwrap(), [(VmId([1; 16]), b"d".to_vec()), (VmId([2; 16]), Vec::new())]);
}

#[test]
fn wrong_files_are_refused() {
    let lab = Lab::new(BrokerOptions::default());
    let both = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let refused = |files: &[OwnedFd], why: &str| {
        let error = lab.client.lease(VmId([1; 16]), &layout(), "", &borrowed(files)).unwrap_err();
        assert!(error.to_string().contains(why), "{why}: {error}");
    };
    refused(&[file(0x1000, both), file(0x3000, both)], "has 4096 bytes");
    refused(&[file(0x3000, both), file(0x1000, SealFlag::F_SEAL_SHRINK)], "not sealed");
    refused(&[file(0x3000, SealFlag::F_SEAL_GROW), file(0x1000, both)], "not sealed");
    refused(&[file(0x3000, both)], "1 memory files for 2 regions");
    refused(&[tempfile::tempfile().unwrap().into(), file(0x1000, both)], "no memory file");
    refused(&[io::pipe().unwrap().0.into(), file(0x1000, both)], "no memory file");
    assert_eq!(lab.client.list().unwrap(), []);
}

#[test]
fn limits() {
    let lab = Lab::new(BrokerOptions { max_vms: 2, max_clients: 3, ..BrokerOptions::default() });
    let leases = [lease(&lab.client, 1, b""), lease(&lab.client, 2, b"")];
    let refused = || lab.client.lease(VmId([3; 16]), &layout(), "", &borrowed(&files())).unwrap_err().to_string();
    assert!(refused().contains("as many as it takes: forget some"));
    // a third client that just sits there
    let sits = UnixStream::connect(lab.client.path()).unwrap();
    while lab.client.list().is_ok() {}
    // it sits no longer
    drop(sits);
    while lab.client.list().is_err() {}
    for lease in leases {
        lease.release().unwrap();
    }
    let third = loop {
        match try_lease(&lab.client, 3, b"") {
            Ok(third) => break third,
            // clients that have gone may still count as such
            Err(error) => assert!(!error.to_string().contains("forget some"), "{error}"),
        }
    };
    third.release().unwrap();
    let nobody = BrokerClient::new(lab._dir.path().join("nobody"));
    let unreachable = nobody.list().unwrap_err();
    assert!(matches!(unreachable, BrokerError::Link { .. }));
    assert!(std::error::Error::source(&unreachable).is_some_and(|cause| cause.is::<io::Error>()));
}

/// What a client can see by itself is refused before anything is sent.
#[test]
fn a_lease_that_cannot_be_is_not_asked_for() {
    let lab = Lab::new(BrokerOptions::default());
    assert_eq!(lab.client.path(), lab._dir.path().join("broker"));
    let files = files();
    let lease = |layout: &RamLayout, label: &str, files: &[BorrowedFd<'_>]| {
        lab.client.lease(VmId([1; 16]), layout, label, files).map(drop)
    };
    lease(&layout(), &"l".repeat(256), &borrowed(&files)).unwrap();
    assert_eq!(lab.client.list().unwrap()[0].label.len(), 256);
    let refused = |result| assert!(matches!(result, Err(BrokerError::Files(_))), "{result:?}");
    refused(lease(&layout(), &"l".repeat(257), &borrowed(&files)));
    refused(lease(&layout(), "", &borrowed(&files[..1])));
    // as many files as a message can carry, and one more
    let of = |count: u64| {
        let regions = (0..count).map(|n| RamRegion { gpa: n * 0x2000, len: 0x1000 }).collect();
        let one = file(0x1000, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW);
        (RamLayout::new(regions).unwrap(), one)
    };
    for (count, fits) in [(253, true), (254, false)] {
        let (layout, one) = of(count);
        let result = lease(&layout, "", &vec![one.as_fd(); count as usize]);
        assert_eq!(result.is_ok(), fits, "{count}: {result:?}");
    }
}

#[test]
fn a_connection_has_one_lease() {
    let lab = Lab::new(BrokerOptions::default());
    let socket = UnixStream::connect(lab.client.path()).unwrap();
    let ask = |id| {
        let message = Message::Lease { id: VmId([id; 16]), layout: layout(), label: String::new() };
        message.send(&socket, &borrowed(&files())).unwrap();
        Message::receive(&socket).unwrap().unwrap().0
    };
    assert_eq!(ask(1), Message::Leased(Vec::new()));
    assert_eq!(ask(2), Message::refused("a connection has one lease"));
    assert_eq!(lab.client.list().unwrap().len(), 1);
}

#[test]
fn a_reason_is_cut_between_characters() {
    let cut = |text: &str| match Message::refused(text) {
        Message::Refused(why) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!((cut(""), cut("no")), (String::new(), "no".to_owned()));
    assert_eq!(cut(&"x".repeat(512)).len(), 512);
    assert_eq!(cut(&"x".repeat(513)).len(), 512);
    assert_eq!(cut(&format!("x{}", "é".repeat(300))).len(), 511);
}

/// A message may come in pieces, each with files. Together they are as many as one piece may have.
#[test]
fn files_of_a_message_are_counted_over_its_pieces() {
    let one = file(0x1000, SealFlag::F_SEAL_GROW);
    for (first, second, fits) in [(200, 53, true), (200, 54, false), (253, 1, false)] {
        let (near, far) = UnixStream::pair().unwrap();
        crate::send_files(near.as_fd(), &[1, 0], &vec![one.as_fd(); first]).unwrap();
        crate::send_files(near.as_fd(), &[0, 0, 3], &vec![one.as_fd(); second]).unwrap();
        let received = Message::receive(&far).map(|message| message.unwrap().1.len()).map_err(|error| error.kind());
        assert_eq!(received, if fits { Ok(253) } else { Err(io::ErrorKind::InvalidData) });
    }
}

/// The longest body is read, and a longer one is refused before room for it is made. The end of the
/// connection is no error between two messages.
#[test]
fn a_message_has_a_longest_body() {
    let receive = |bytes: &[u8]| {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        let bytes = bytes.to_vec();
        let writer = thread::spawn(move || near.write_all(&bytes));
        let received = Message::receive(&far);
        drop(far);
        let _ = writer.join();
        received.map(|message| message.map(|(message, files)| (message, files.len()))).map_err(|e| e.kind())
    };
    assert_eq!(receive(&[]), Ok(None));
    for bytes in [&[1][..], &[1, 0, 0], &[2, 0, 0, 0, 3]] {
        assert_eq!(receive(bytes), Err(io::ErrorKind::UnexpectedEof), "{bytes:?}");
    }
    assert_eq!(receive(&[1, 0, 0, 0, 3]), Ok(Some((Message::List, 0))));
    let long = |len: usize| [&(len as u32).to_le_bytes()[..], &vec![0; len]].concat();
    // no message, but as long as one may be: its kind is looked at
    let refused = |len| {
        let (mut near, far) = UnixStream::pair().unwrap();
        let bytes = long(len);
        let writer = thread::spawn(move || near.write_all(&bytes));
        let error = Message::receive(&far).unwrap_err();
        drop(far);
        let _ = writer.join();
        error.to_string()
    };
    let (most, more) = (refused(512 << 10), refused((512 << 10) + 1));
    assert!(most.contains("0 is no message"), "{most}");
    assert!(more.contains("524288"), "{more}");
}

/// A client that says nonsense, or nothing, is closed, and disturbs nobody.
#[test]
fn bad_clients() {
    let lab = Lab::new(BrokerOptions::default());
    let _kept = lease(&lab.client, 1, b"one");
    let is_closed = |lab: &Lab, bytes: &[u8]| {
        let mut bad = UnixStream::connect(lab.client.path()).unwrap();
        // it may be closed already
        let _ = bad.write_all(bytes);
        let mut rest = Vec::new();
        let _ = bad.read_to_end(&mut rest);
        assert!(rest.is_empty());
    };
    for bytes in [&u32::MAX.to_le_bytes()[..], &[1, 0, 0, 0, 99], &[2, 0, 0, 0, 1, 1]] {
        is_closed(&lab, bytes);
    }
    let ask = |message: Message, files: &[OwnedFd]| {
        let socket = UnixStream::connect(lab.client.path()).unwrap();
        message.send(&socket, &borrowed(files)).unwrap();
        Message::receive(&socket).unwrap().unwrap().0
    };
    for message in [
        Message::Done,
        Message::Release,
        Message::Metadata(vec![1]),
        Message::Leased(vec![]),
        Message::Listed(vec![]),
        Message::refused("x".repeat(600)),
    ] {
        assert!(matches!(ask(message.clone(), &[]), Message::Refused(_)), "{message:?}");
    }
    assert!(matches!(ask(Message::List, &files()), Message::Refused(_)));
    assert!(matches!(lab.client.list().unwrap()[..], [RetainedRam { owned: true, .. }]));

    let impatient = Lab::new(BrokerOptions { timeout: Duration::from_millis(20), ..BrokerOptions::default() });
    // this test may be too slow for it
    let lease = || try_lease(&impatient.client, 1, b"");
    let _kept = std::iter::repeat_with(lease).find_map(Result::ok).unwrap();
    for bytes in [&[3, 0][..], &[]] {
        is_closed(&impatient, bytes);
    }
    // an owner may be silent for as long as it likes
    assert!(matches!(impatient.broker.list()[..], [RetainedRam { owned: true, .. }]));
}

proptest! {
    #[test]
    fn messages_travel(id in any::<[u8; 16]>(), label in "[a-z]{0,40}", bytes in any::<u64>(), pid in any::<u32>()) {
        let kept = RetainedRam { id: VmId(id), bytes, label: label.clone(), pid, owned: pid % 2 == 0 };
        let messages = [
            Message::Lease { id: VmId(id), layout: layout(), label: label.clone() },
            Message::Release,
            Message::List,
            Message::Retrieve(VmId(id)),
            Message::Forget(VmId(id)),
            Message::Done,
            Message::Listed(vec![kept; 3]),
            Message::Retrieved { layout: layout(), label },
            Message::refused("no"),
            Message::Leased(id.to_vec()),
            Message::Metadata(Vec::new()),
        ];
        for message in messages {
            let body = message.encode();
            prop_assert_eq!(Message::decode(&body), Ok(message));
            for end in 0..body.len() {
                prop_assert!(Message::decode(&body[..end]).is_err());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Message::decode(&bytes);
    }
}
