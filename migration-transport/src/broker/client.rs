//! The client's end of a RAM broker.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use migration_core::{RamLayout, vm::VmId};
use rustix::{
    net::sockopt::socket_peercred,
    process::{Uid, geteuid},
};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    BrokerError, RetainedRam, RetrievedRam, check_files,
    message::{MAX_LABEL, MAX_METADATA, Message},
};
use crate::MAX_FILES;

/// How long a broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Talks to a [`RamBroker`](super::RamBroker).
#[derive(Clone, Debug)]
pub struct BrokerClient {
    path: PathBuf,
}

impl BrokerClient {
    /// Returns a client of the broker whose socket is at `path`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where the broker's socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has the broker retain the RAM of a VM until the [`RamLease`] is released. If the lease is
    /// dropped, or this process dies, the RAM stays. An earlier lease of the same VM, such as that
    /// of the VMM from which it came, is replaced.
    ///
    /// `files` are the memory files of the layout's regions, in their order; `label` is for people,
    /// at most 256 bytes.
    ///
    /// # Errors
    /// [`BrokerError::Files`] unless there is one for each of at most [`MAX_FILES`] regions;
    /// [`BrokerError::Refused`] when they are not sealed, of another length, or the broker keeps as
    /// many VMs as it may.
    pub fn lease(
        &self,
        id: VmId,
        layout: &RamLayout,
        label: &str,
        files: &[BorrowedFd<'_>],
    ) -> Result<RamLease, BrokerError> {
        let regions = layout.regions().len();
        if files.len() != regions || regions > MAX_FILES || label.len() > MAX_LABEL {
            let why = format!(
                "{} memory files for {regions} regions of RAM (at most {MAX_FILES}), or too long a label",
                files.len()
            );
            return Err(BrokerError::Files(why));
        }
        let socket = self.connect()?;
        let message = Message::Lease { id, layout: layout.clone(), label: label.to_owned() };
        match self.ask(&socket, &message, files)? {
            (Message::Leased(previous_metadata), _) => Ok(RamLease { client: self.clone(), socket, previous_metadata }),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Returns everything that the broker keeps.
    ///
    /// # Errors
    /// Returns an error if the broker cannot be reached, or refuses.
    pub fn list(&self) -> Result<Vec<RetainedRam>, BrokerError> {
        match self.ask(&self.connect()?, &Message::List, &[])? {
            (Message::Listed(list), _) => Ok(list),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Returns the RAM of a VM. The broker keeps it as well, until it is [forgotten](Self::forget).
    ///
    /// # Errors
    /// [`BrokerError::Refused`] when the broker has none of this VM; [`BrokerError::Files`] when
    /// what came is not what its layout says.
    pub fn retrieve(&self, id: VmId) -> Result<RetrievedRam, BrokerError> {
        match self.ask(&self.connect()?, &Message::Retrieve(id), &[])? {
            (Message::Retrieved { layout, label }, files) => {
                check_files(&layout, &files).map_err(BrokerError::Files)?;
                Ok(RetrievedRam { layout, label, files })
            }
            other => Err(unexpected(&other.0)),
        }
    }

    /// Frees the RAM of a VM whose owner is gone.
    ///
    /// # Errors
    /// [`BrokerError::Refused`] when the broker has none of this VM, or its owner lives.
    pub fn forget(&self, id: VmId) -> Result<(), BrokerError> {
        done(self.ask(&self.connect()?, &Message::Forget(id), &[])?.0)
    }

    fn connect(&self) -> Result<Socket, BrokerError> {
        let open = || {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.set_write_timeout(Some(PATIENCE))?;
            socket.connect(&SockAddr::unix(&self.path)?)?;
            Ok(socket)
        };
        let socket = open().map_err(self.link())?;
        let uid = socket_peercred(&socket).map_err(io::Error::from).map_err(self.link())?.uid;
        if !trusts(geteuid(), uid) {
            return Err(BrokerError::OtherUser { path: self.path.clone(), uid: uid.as_raw() });
        }
        Ok(socket)
    }

    fn ask(
        &self,
        socket: &Socket,
        message: &Message,
        files: &[BorrowedFd<'_>],
    ) -> Result<(Message, Vec<OwnedFd>), BrokerError> {
        let answer = message.send(socket.as_fd(), files).and_then(|()| Message::receive(socket.as_fd()));
        match answer.map_err(self.link())? {
            Some((Message::Refused(why), _)) => Err(BrokerError::Refused(why)),
            Some(answer) => Ok(answer),
            None => Err(self.link()(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"))),
        }
    }

    fn link(&self) -> impl FnOnce(io::Error) -> BrokerError + use<> {
        let path = self.path.clone();
        |cause| BrokerError::Link { path, cause }
    }
}

/// RAM that a broker keeps for this process. Dropping it leaves it there, as the death of this
/// process does.
#[derive(Debug)]
pub struct RamLease {
    client: BrokerClient,
    socket: Socket,
    previous_metadata: Vec<u8>,
}

impl RamLease {
    /// Returns the last [metadata](Self::set_metadata) of the VM's owner before this one; empty if
    /// there was none. The broker keeps it as the metadata of this lease until there is another.
    pub fn previous_metadata(&self) -> &[u8] {
        &self.previous_metadata
    }

    /// Sets the metadata of the VM, for the time after this process: whoever is
    /// [notified](super::OwnerGone) of its death gets it, and so does the next owner. It has any
    /// form, and at most 16 KiB.
    ///
    /// # Errors
    /// [`BrokerError::Refused`] when it is too long, or another process owns the VM by now;
    /// [`BrokerError::Link`] when the broker has gone, or closed the connection: then the metadata
    /// before may still count.
    pub fn set_metadata(&self, metadata: &[u8]) -> Result<(), BrokerError> {
        if metadata.len() > MAX_METADATA {
            return Err(BrokerError::Refused(format!("metadata of {} bytes is too long", metadata.len())));
        }
        done(self.client.ask(&self.socket, &Message::Metadata(metadata.to_vec()), &[])?.0)
    }

    /// Releases the RAM: the VM has ended well, or moved away. (If another process has a lease of
    /// the same VM since, the RAM stays.)
    ///
    /// # Errors
    /// Returns an error if the broker is gone, and the RAM with it.
    pub fn release(self) -> Result<(), BrokerError> {
        done(self.client.ask(&self.socket, &Message::Release, &[])?.0)
    }
}

/// Returns whether a process of `user` gives its VM's memory to a broker that `broker` runs.
fn trusts(user: Uid, broker: Uid) -> bool {
    broker == user || broker.is_root()
}

fn done(answer: Message) -> Result<(), BrokerError> {
    if answer == Message::Done { Ok(()) } else { Err(unexpected(&answer)) }
}

fn unexpected(_answer: &Message) -> BrokerError {
    BrokerError::Malformed(migration_core::codec::DecodeError::invalid("answer", "it fits no question"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_fits_no_question_is_an_error() {
        assert!(done(Message::Done).is_ok());
        assert!(matches!(done(Message::List), Err(BrokerError::Malformed(_))));
    }

    #[test]
    fn memory_goes_to_the_same_user_or_to_root() {
        let [root, one, other] = [0, 1000, 1001].map(Uid::from_raw);
        assert!(trusts(one, one) && trusts(one, root) && trusts(root, root));
        assert!(!trusts(one, other) && !trusts(root, one));
    }
}
