//! The broker itself.

use std::{
    collections::BTreeMap,
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use migration_core::{
    RamLayout,
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    vm::VmId,
};
use rustix::{
    net::sockopt::socket_peercred,
    process::{Uid, geteuid},
};
use socket2::Socket;

use super::{
    RetainedRam, check_files,
    message::{MAX_LIST, Message},
};
use crate::UnixListener;

/// How often it is looked whether the broker is to stop.
const TICK: Duration = Duration::from_millis(100);

/// Limits of a broker.
#[derive(Clone)]
pub struct BrokerOptions {
    /// Most VMs whose RAM it keeps, at most 1024; further ones are refused.
    pub max_vms: usize,
    /// Most connections at a time; an owner has one for as long as it lives.
    pub max_clients: usize,
    /// How long a client may be silent before its first request, or in the middle of one.
    pub timeout: Duration,
    /// Starts a thread for each client.
    pub spawner: Arc<dyn Spawner>,
    /// Is notified of VMs whose owner has gone.
    pub owner_gone: Option<Arc<dyn OwnerGone>>,
}

/// Is notified when the owner of RAM has gone without taking it along: it has died, or its
/// connection has broken.
///
/// Whoever restarts the VM then makes certain first that no process runs it any more; a closed
/// connection is no proof of that.
pub trait OwnerGone: Send + Sync {
    /// `metadata` is what the owner has [set](super::RamLease::set_metadata). Called on the thread
    /// that served the owner, which ends with it.
    fn owner_gone(&self, ram: &RetainedRam, metadata: &[u8]);
}

impl Default for BrokerOptions {
    fn default() -> Self {
        let spawner = Arc::new(StdSpawner);
        Self { max_vms: 64, max_clients: 256, timeout: Duration::from_secs(5), spawner, owner_gone: None }
    }
}

/// Keeps descriptors of the memory files of VMs, for VMMs of the same user on the same host.
///
/// The memory stays as long as the broker lives and is not told to forget it. It never maps the
/// files, and looks at nothing in them. Let it run in a process of its own, which has no reason to
/// die; a thread of a VMM keeps RAM for *other* VMMs only.
pub struct RamBroker {
    options: BrokerOptions,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    vms: BTreeMap<[u8; 16], Entry>,
    /// Of the next lease; none is used twice.
    next: u64,
}

struct Entry {
    /// Which lease it is.
    number: u64,
    layout: RamLayout,
    label: String,
    files: Vec<Arc<OwnedFd>>,
    pid: u32,
    owned: bool,
    metadata: Vec<u8>,
}

impl Entry {
    fn describe(&self, id: [u8; 16]) -> RetainedRam {
        RetainedRam {
            id: VmId(id),
            bytes: self.layout.bytes(),
            label: self.label.clone(),
            pid: self.pid,
            owned: self.owned,
        }
    }
}

/// A client, from outside its thread.
struct Client {
    socket: Socket,
    ended: Arc<AtomicBool>,
    thread: Box<dyn Joiner>,
}

impl RamBroker {
    /// Returns a broker that keeps nothing yet.
    pub fn new(options: BrokerOptions) -> Arc<Self> {
        let max_vms = options.max_vms.min(MAX_LIST);
        Arc::new(Self { options: BrokerOptions { max_vms, ..options }, kept: Mutex::default() })
    }

    /// What it keeps.
    pub fn list(&self) -> Vec<RetainedRam> {
        self.lock().vms.iter().map(|(&id, entry)| entry.describe(id)).collect()
    }

    /// Serves clients until `stop` is set, on the calling thread and on one more for each client;
    /// all of these have ended when it returns. What is kept stays until the broker is dropped.
    ///
    /// Only processes of the broker's own user are served.
    ///
    /// # Errors
    /// Returns an error if the listener breaks.
    pub fn serve(self: &Arc<Self>, listener: &mut UnixListener, stop: &AtomicBool) -> io::Result<()> {
        let mut clients: Vec<Client> = Vec::new();
        let mut broken = Ok(());
        while broken.is_ok() && !stop.load(Ordering::Relaxed) {
            match listener.accept_socket(TICK) {
                Ok(Some(socket)) => {
                    reap(&mut clients, |client| client.ended.load(Ordering::Acquire));
                    // one that cannot be served is closed, and may try again
                    clients.extend(self.admit(socket, clients.len()));
                }
                Ok(None) => reap(&mut clients, |client| client.ended.load(Ordering::Acquire)),
                Err(error) => broken = Err(error),
            }
        }
        for client in &clients {
            // it may have ended already
            let _ = client.socket.shutdown(std::net::Shutdown::Both);
        }
        reap(&mut clients, |_| true);
        broken
    }

    fn admit(self: &Arc<Self>, socket: Socket, clients: usize) -> Option<Client> {
        socket.set_nonblocking(false).ok()?;
        socket.set_read_timeout(Some(self.options.timeout)).ok()?;
        socket.set_write_timeout(Some(self.options.timeout)).ok()?;
        let peer = socket_peercred(&socket).ok()?;
        if let Some(why) = self.refusal(geteuid(), peer.uid, clients) {
            // whoever is refused may be gone
            let _ = Message::refused(why).send(socket.as_fd(), &[]);
            return None;
        }
        let (broker, ended) = (self.clone(), Arc::new(AtomicBool::new(false)));
        let (served, over) = (socket.try_clone().ok()?, ended.clone());
        let pid = peer.pid.as_raw_nonzero().get().unsigned_abs();
        let body = Box::new(move || {
            broker.client(&served, pid);
            over.store(true, Ordering::Release);
        });
        let thread = self.options.spawner.spawn(Role::Background, GuestImpact::Balanced, "broker", body).ok()?;
        Some(Client { socket, ended, thread })
    }

    /// Returns why a broker of `user` that has so many clients does not serve one of `client`.
    fn refusal(&self, user: Uid, client: Uid, clients: usize) -> Option<String> {
        if client != user {
            Some(format!("it serves user {} only", user.as_raw()))
        } else if clients >= self.options.max_clients {
            Some(format!("it has {clients} clients, as many as it takes"))
        } else {
            None
        }
    }

    /// Serves one client to its end, be it a bad one.
    fn client(&self, socket: &Socket, pid: u32) {
        let mut lease = None;
        // an error ends the connection, as its end does
        while let Ok(Some((message, files))) = Message::receive(socket.as_fd()) {
            let (answer, files) = self.answer(message, files, pid, &mut lease);
            let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
            if answer.send(socket.as_fd(), &files).is_err() {
                break;
            }
            // an owner says nothing for as long as it lives
            let timeout = if lease.is_some() { None } else { Some(self.options.timeout) };
            if socket.set_read_timeout(timeout).is_err() {
                break;
            }
        }
        // so that nothing half-read keeps it open
        let _ = socket.shutdown(std::net::Shutdown::Both);
        let lost = lease.and_then(|(id, number)| self.lose(id, number));
        if let (Some((ram, metadata)), Some(owner_gone)) = (lost, &self.options.owner_gone) {
            owner_gone.owner_gone(&ram, &metadata);
        }
    }

    /// The owner of this lease has gone; what it leaves, unless another owner has the VM.
    fn lose(&self, id: [u8; 16], number: u64) -> Option<(RetainedRam, Vec<u8>)> {
        let mut kept = self.lock();
        let entry = kept.vms.get_mut(&id).filter(|entry| entry.number == number)?;
        entry.owned = false;
        Some((entry.describe(id), entry.metadata.clone()))
    }

    fn answer(
        &self,
        message: Message,
        files: Vec<OwnedFd>,
        pid: u32,
        lease: &mut Option<([u8; 16], u64)>,
    ) -> (Message, Vec<Arc<OwnedFd>>) {
        let answer = match message {
            Message::Lease { .. } if lease.is_some() => Message::refused("a connection has one lease"),
            Message::Lease { id, layout, label } => match check_files(&layout, &files) {
                Ok(()) => self.keep(id, (layout, label), files, pid, lease),
                Err(why) => Message::refused(why),
            },
            _ if !files.is_empty() => Message::refused("files come with a lease only"),
            Message::Metadata(metadata) => match *lease {
                Some((id, number)) => {
                    let mut kept = self.lock();
                    match kept.vms.get_mut(&id).filter(|entry| entry.number == number) {
                        Some(entry) => {
                            entry.metadata = metadata;
                            Message::Done
                        }
                        None => Message::refused("another process has a lease of this VM since"),
                    }
                }
                None => Message::refused(NO_LEASE),
            },
            Message::Release => match lease.take() {
                Some((id, number)) => {
                    let mut kept = self.lock();
                    if kept.vms.get(&id).is_some_and(|entry| entry.number == number) {
                        kept.vms.remove(&id);
                    }
                    Message::Done
                }
                None => Message::refused(NO_LEASE),
            },
            Message::List => Message::Listed(self.list()),
            Message::Retrieve(id) => match self.lock().vms.get(&id.0) {
                Some(entry) => {
                    let answer = Message::Retrieved { layout: entry.layout.clone(), label: entry.label.clone() };
                    return (answer, entry.files.clone());
                }
                None => Message::refused(NONE_KEPT),
            },
            Message::Forget(id) => {
                let mut kept = self.lock();
                match kept.vms.get(&id.0) {
                    Some(entry) if entry.owned => {
                        Message::refused(format!("its owner, process {}, lives: it forgets it when it ends", entry.pid))
                    }
                    Some(_) => {
                        kept.vms.remove(&id.0);
                        Message::Done
                    }
                    None => Message::refused(NONE_KEPT),
                }
            }
            _ => Message::refused("that is no request"),
        };
        (answer, Vec::new())
    }

    fn keep(
        &self,
        VmId(id): VmId,
        (layout, label): (RamLayout, String),
        files: Vec<OwnedFd>,
        pid: u32,
        lease: &mut Option<([u8; 16], u64)>,
    ) -> Message {
        let mut kept = self.lock();
        if kept.vms.len() >= self.options.max_vms && !kept.vms.contains_key(&id) {
            let most = self.options.max_vms;
            return Message::refused(format!("it keeps the RAM of {most} VMs, as many as it takes: forget some"));
        }
        let number = kept.next;
        kept.next += 1;
        let files = files.into_iter().map(Arc::new).collect();
        let metadata = kept.vms.get(&id).map(|entry| entry.metadata.clone()).unwrap_or_default();
        kept.vms.insert(id, Entry { number, layout, label, files, pid, owned: true, metadata: metadata.clone() });
        *lease = Some((id, number));
        Message::Leased(metadata)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // no invariant spans a panic: every entry is inserted or removed whole
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }
}

const NONE_KEPT: &str = "it keeps no RAM of this VM";
const NO_LEASE: &str = "this connection has no lease";

impl fmt::Debug for RamBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBroker").field("kept", &self.list()).finish_non_exhaustive()
    }
}

/// Joins the threads of those clients that `which` picks.
fn reap(clients: &mut Vec<Client>, which: impl Fn(&Client) -> bool) {
    for client in clients.extract_if(.., |client| which(client)) {
        client.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_the_same_user_are_served_as_long_as_there_is_room() {
        let broker = RamBroker::new(BrokerOptions { max_clients: 2, ..BrokerOptions::default() });
        let [root, one, other] = [0, 1000, 1001].map(Uid::from_raw);
        assert_eq!([0, 1].map(|clients| broker.refusal(one, one, clients)), [None, None]);
        assert!(broker.refusal(one, one, 2).unwrap().contains("2 clients"));
        for (user, client) in [(one, other), (one, root), (root, one)] {
            let why = broker.refusal(user, client, 0).unwrap();
            assert_eq!(why, format!("it serves user {} only", user.as_raw()));
        }
    }

    #[test]
    fn a_list_has_as_many_vms_as_its_message_can_carry() {
        let keeps = |max_vms| RamBroker::new(BrokerOptions { max_vms, ..BrokerOptions::default() }).options.max_vms;
        assert_eq!([0, MAX_LIST, MAX_LIST + 1].map(keeps), [0, MAX_LIST, MAX_LIST]);
    }
}
