//! What goes between a broker and its clients: a length, a body, and descriptors with its first
//! byte.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use migration_core::{
    RamLayout,
    codec::{DecodeError, Reader, Writer},
    vm::VmId,
};

use super::RetainedRam;
use crate::{MAX_FILES, receive_files, send_files};

/// Longest body: the list of as many VMs as a broker keeps at the most.
const MAX_BODY: usize = 512 << 10;
/// Most VMs that a list may have.
pub(super) const MAX_LIST: usize = 1024;
/// Longest label.
pub(super) const MAX_LABEL: usize = 256;
/// Longest metadata: some paths, and what names a few processes.
pub(super) const MAX_METADATA: usize = 16 << 10;
/// Longest reason of a refusal.
const MAX_REASON: usize = 512;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Keep this; a file comes with it for each region. The connection stays open as long as the
    /// sender owns it.
    Lease {
        id: VmId,
        layout: RamLayout,
        label: String,
    },
    /// It is kept; the metadata of the VM's owner before.
    Leased(Vec<u8>),
    /// The metadata of the lease.
    Metadata(Vec<u8>),
    /// The owner does not need it to be kept any more.
    Release,
    List,
    Retrieve(VmId),
    /// Of an owner that is gone.
    Forget(VmId),
    Done,
    Listed(Vec<RetainedRam>),
    /// A file comes with it for each region.
    Retrieved {
        layout: RamLayout,
        label: String,
    },
    Refused(String),
}

impl Message {
    pub(super) fn refused(why: impl Into<String>) -> Self {
        let mut why = why.into();
        let end = (0..=MAX_REASON.min(why.len())).rev().find(|&end| why.is_char_boundary(end)).unwrap_or(0);
        why.truncate(end);
        Self::Refused(why)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Self::Lease { id, layout, label } => {
                w.u8(1).bytes(&id.0).text(label);
                layout.encode(&mut w);
            }
            Self::Release => {
                w.u8(2);
            }
            Self::List => {
                w.u8(3);
            }
            Self::Retrieve(id) => {
                w.u8(4).bytes(&id.0);
            }
            Self::Forget(id) => {
                w.u8(5).bytes(&id.0);
            }
            Self::Done => {
                w.u8(6);
            }
            Self::Listed(list) => {
                w.u8(7).count(list.len());
                for kept in list {
                    w.bytes(&kept.id.0).u64(kept.bytes).text(&kept.label).u32(kept.pid).bool(kept.owned);
                }
            }
            Self::Retrieved { layout, label } => {
                w.u8(8).text(label);
                layout.encode(&mut w);
            }
            Self::Refused(why) => {
                w.u8(9).text(why);
            }
            Self::Leased(metadata) => {
                w.u8(10).blob(metadata);
            }
            Self::Metadata(metadata) => {
                w.u8(11).blob(metadata);
            }
        }
        w.into_bytes()
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(body);
        let id = |r: &mut Reader<'_>| r.array("vm id").map(VmId);
        let message = match r.u8("kind")? {
            1 => {
                let (id, label) = (id(&mut r)?, r.text(MAX_LABEL, "label")?);
                Self::Lease { id, label, layout: RamLayout::decode(&mut r, MAX_FILES)? }
            }
            2 => Self::Release,
            3 => Self::List,
            4 => Self::Retrieve(id(&mut r)?),
            5 => Self::Forget(id(&mut r)?),
            6 => Self::Done,
            7 => {
                let mut list = Vec::new();
                for _ in 0..r.count(MAX_LIST, "number of VMs")? {
                    list.push(RetainedRam {
                        id: id(&mut r)?,
                        bytes: r.u64("bytes")?,
                        label: r.text(MAX_LABEL, "label")?,
                        pid: r.u32("process")?,
                        owned: r.bool("owned")?,
                    });
                }
                Self::Listed(list)
            }
            8 => {
                let label = r.text(MAX_LABEL, "label")?;
                Self::Retrieved { label, layout: RamLayout::decode(&mut r, MAX_FILES)? }
            }
            9 => Self::Refused(r.text(MAX_REASON, "reason")?),
            10 => Self::Leased(r.blob(MAX_METADATA, "metadata")?.to_vec()),
            11 => Self::Metadata(r.blob(MAX_METADATA, "metadata")?.to_vec()),
            kind => return Err(DecodeError::invalid("kind", format!("{kind} is no message"))),
        };
        r.finish()?;
        Ok(message)
    }

    pub(super) fn send(&self, socket: impl AsFd, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let body = self.encode();
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend(body);
        send_files(socket.as_fd(), &bytes, files)
    }

    /// Returns the next message and its files, which have not been looked at; `None` at the end of
    /// the connection.
    pub(super) fn receive(socket: impl AsFd) -> io::Result<Option<(Self, Vec<OwnedFd>)>> {
        let mut files = Vec::new();
        let mut head = [0; 4];
        match fill(socket.as_fd(), &mut head, &mut files)? {
            0 => return Ok(None),
            4 => {}
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        let len = u32::from_le_bytes(head) as usize;
        if len > MAX_BODY {
            let why = DecodeError::TooLong { field: "message", len: len as u64, limit: MAX_BODY as u64 };
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let mut body = vec![0; len];
        if fill(socket.as_fd(), &mut body, &mut files)? < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let message = Self::decode(&body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Some((message, files)))
    }
}

/// Fills `buf` as far as the stream goes, and takes the files that come; how many bytes came.
fn fill(socket: BorrowedFd<'_>, buf: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match receive_files(socket, &mut buf[filled..], MAX_FILES - files.len())? {
            (0, _) => break,
            (bytes, came) => {
                filled += bytes;
                files.extend(came);
            }
        }
    }
    Ok(filled)
}
