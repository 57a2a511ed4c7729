//! Tests of what a secure connector, listener or channel passes on to the inner one.

use migration_core::channel::{ReadHalf, Room};

use super::*;

struct Noted {
    inner: memory::MemoryListener,
    refused: Arc<Mutex<usize>>,
    short: Arc<Mutex<Vec<&'static str>>>,
}

impl Listener for Noted {
    fn accept(&mut self, timeout: Duration) -> io::Result<Option<Box<dyn Channel>>> {
        let channel = self.inner.accept(timeout)?;
        Ok(channel.map(|channel| Box::new(NotedChannel(channel, self.short.clone())) as Box<dyn Channel>))
    }

    fn address(&self) -> String {
        "here".into()
    }

    fn bound(&self) -> Vec<String> {
        vec!["127.0.0.1:1".into(), "[::1]:1".into()]
    }

    fn trouble(&mut self) -> Option<io::Error> {
        Some(io::ErrorKind::OutOfMemory.into())
    }

    fn accept_to_refuse(&mut self) -> Option<Box<dyn Channel>> {
        *self.refused.lock().unwrap() += 1;
        None
    }

    fn room(&self) -> Option<Arc<dyn Room>> {
        struct Seven;
        impl Room for Seven {
            fn channels(&self, _: usize) -> usize {
                7
            }
        }
        Some(Arc::new(Seven))
    }
}

/// A channel whose writer records the hints that it gets.
struct NotedChannel(Box<dyn Channel>, Arc<Mutex<Vec<&'static str>>>);

struct NotedWriter(Box<dyn WriteHalf>, Arc<Mutex<Vec<&'static str>>>);

impl Channel for NotedChannel {
    fn split(self: Box<Self>) -> io::Result<Halves> {
        let halves = self.0.split()?;
        Ok(Halves { writer: Box::new(NotedWriter(halves.writer, self.1)), ..halves })
    }

    fn peer(&self) -> String {
        "a source".into()
    }
}

impl WriteHalf for NotedWriter {
    fn write_all(&mut self, head: &[u8], slices: &[RamSlice<'_>]) -> io::Result<()> {
        self.0.write_all(head, slices)
    }

    fn set_idle_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if timeout == Some(Duration::from_secs(77)) {
            self.1.lock().unwrap().push("idle");
        }
        self.0.set_idle_timeout(timeout)
    }

    fn keep_queue_short(&mut self) {
        self.1.lock().unwrap().push("short");
    }
}

#[test]
fn what_a_listener_knows_is_passed_on() {
    let (plain, inner) = memory::link(1 << 20);
    let (refused, notes) = (Arc::default(), Arc::default());
    let noted = Noted { inner, refused: Arc::clone(&refused), short: Arc::clone(&notes) };
    let mut listener = SecureListener::new(Box::new(noted), psk(1));
    assert_eq!((listener.address(), listener.bound()), ("here".into(), vec!["127.0.0.1:1".into(), "[::1]:1".into()]));
    assert_eq!(listener.trouble().unwrap().kind(), io::ErrorKind::OutOfMemory);
    assert_eq!(listener.room().unwrap().channels(9), 7);
    // a channel that is accepted to be refused cannot be informed, but must not wait any longer
    assert!(listener.accept_to_refuse().is_none());
    assert_eq!(*refused.lock().unwrap(), 1);

    let address = plain.address();
    let connector = SecureConnector::new(Box::new(plain), psk(1));
    assert_eq!(connector.address(), address);
    assert!(!address.is_empty());
    thread::scope(|scope| {
        let here = scope.spawn(|| {
            // with a long limit the handshake is done in time
            let channel = connector.connect_within(LaneKind::Control, Duration::from_secs(60)).unwrap();
            assert!(!channel.peer().is_empty() && channel.peer() != "xyzzy");
            let mut halves = channel.split().unwrap();
            halves.reader.read_exact(&mut [0]).unwrap();
            halves.writer.write_all(b"!", &[]).unwrap();
            halves
        });
        let channel = listener.accept(Duration::from_secs(60)).unwrap().unwrap();
        assert_eq!(channel.peer(), "a source");
        let mut there = channel.split().unwrap();
        // hints given before the handshake, and those given after it
        there.writer.keep_queue_short();
        there.writer.set_idle_timeout(Some(Duration::from_secs(77))).unwrap();
        assert_eq!(*notes.lock().unwrap(), [""; 0]);
        there.writer.write_all(b"!", &[]).unwrap();
        assert_eq!(*notes.lock().unwrap(), ["idle", "short"]);
        there.writer.keep_queue_short();
        there.writer.set_idle_timeout(Some(Duration::from_secs(77))).unwrap();
        assert_eq!(*notes.lock().unwrap(), ["idle", "short", "short", "idle"]);
        let reader: &mut dyn ReadHalf = &mut *there.reader;
        reader.read_exact(&mut [0]).unwrap();
        drop(here.join().unwrap());
    });
}
