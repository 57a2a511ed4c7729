//! How pages travel: puts as one transaction, gets as requests that follow each other.

use migration_core::store::{NamespaceId, PageData, PageToGet, PageToPut, Record, StoreError, VmNamespace};

use super::{
    blocks::{
        BLOCK_OVERHEAD, BLOCK_PAGES, MAX_BLOCK_BYTES, Parts, Piece, SLOT_BYTES, block_len, index, pieces,
        value_in_block, value_in_slot, write_directory,
    },
    connection::Connection,
    resp::{Command, Fail, Reply, write_head},
    scripts::{Answer, Keys, PUT, read_pages},
    stream::Wait,
};

/// Bytes that are sent in one call of the system: few enough to be in the processor's cache since
/// their checksums were made.
const SEND_BYTES: usize = 256 << 10;
/// A block of which fewer pages are wanted is not read as a whole.
const WHOLE_FROM: usize = 4;

/// Puts of one generation.
pub(super) struct Put<'a> {
    pub(super) keys: &'a Keys,
    pub(super) namespace: VmNamespace,
    pub(super) generation: u32,
    pub(super) pages: &'a [PageToPut<'a>],
    /// Most bytes that the store may take.
    pub(super) limit: u64,
}

impl Put<'_> {
    /// Stages all blocks and lets the script move them into the namespace, in one transaction. So
    /// the server copies no page, and sees the comparison, the put and the check of the record as
    /// one step.
    pub(super) fn run(&self, connection: &mut Connection, wait: Wait) -> Result<Answer, Fail> {
        let pieces = pieces(self.pages.iter().map(|page| page.page));
        let stage = self.keys.stage_start(connection.name);
        let mut parts = Parts::default();
        let mut commands = 1;
        Command::new("MULTI").write_to(parts.small());
        for (number, piece) in pieces.iter().enumerate() {
            let pages = &self.pages[piece.pages.clone()];
            let key = format!("{stage}{number}");
            write_head(parts.small(), b'*', 3);
            for word in ["SET", &key] {
                write_head(parts.small(), b'$', word.len());
                parts.small().extend_from_slice(word.as_bytes());
                parts.small().extend_from_slice(b"\r\n");
            }
            write_head(parts.small(), b'$', block_len(pages.len()));
            write_directory(parts.small(), self.generation, pages);
            pages.iter().for_each(|page| parts.slot(self.namespace.vm, self.generation, page));
            parts.small().extend_from_slice(b"\r\n");
            commands += 1;
            if parts.len() >= SEND_BYTES {
                connection.send(&mut parts.slices(), commands, wait)?;
                parts.clear();
                commands = 0;
            }
        }
        self.script(&pieces, &stage).write_to(parts.small());
        Command::new("EXEC").write_to(parts.small());
        connection.send(&mut parts.slices(), commands + 2, wait)?;
        // the answers to MULTI, each SET and the script: that they were understood
        let mut refused = None;
        for _ in 0..pieces.len() + 2 {
            if let Reply::Error(text) = connection.any_reply(wait)? {
                refused.get_or_insert(text);
            }
        }
        let done = connection.any_reply(wait)?;
        match (refused, done) {
            // that of the transaction only says that it was given up
            (Some(text), _) | (None, Reply::Error(text)) => Err(Fail::Answer(text)),
            (None, Reply::List(mut replies)) => match replies.pop() {
                Some(Reply::Error(text)) => Err(Fail::Answer(text)),
                Some(answer) => Answer::new(answer),
                None => Err(Fail::nonsense("a transaction without answers")),
            },
            (None, _) => Err(Fail::nonsense("a transaction without answers")),
        }
    }

    fn script(&self, pieces: &[Piece], stage: &str) -> Command {
        let Self { keys, namespace, .. } = self;
        let id = namespace.id;
        let (store, space, blocks, used) = (keys.store(), keys.space(id), keys.blocks(id), keys.used());
        let count = 4 + 2 * pieces.len();
        let mut command = Command::new("EVAL").arg(PUT).number(count);
        for key in [store, space, blocks, used] {
            command = command.arg(key);
        }
        for (number, piece) in pieces.iter().enumerate() {
            command = command.arg(format!("{stage}{number}")).arg(keys.block(id, piece.block));
        }
        // above what a double of the server's Lua can count, there is no limit
        command = command.arg(namespace.vm.0).number(self.generation).number(self.limit.min(1 << 53));
        command = command.number(BLOCK_OVERHEAD).number(SLOT_BYTES).number(BLOCK_PAGES);
        for piece in pieces {
            let of_page = |page: &PageToPut<'_>| {
                let [low, high] = (page.value.len() as u16).to_le_bytes();
                [index(page.page), low, high]
            };
            let pages: Vec<u8> = self.pages[piece.pages.clone()].iter().flat_map(of_page).collect();
            command = command.number(piece.block).arg(pages);
        }
        command
    }
}

/// A get under way. After a connection was lost, it goes on with what was not yet read.
pub(super) struct Get<'a> {
    keys: &'a Keys,
    store: &'a str,
    namespace: VmNamespace,
    pages: &'a [PageToGet],
    pieces: Vec<Piece>,
    /// Most pages that may be on their way.
    window: usize,
    /// How many pieces were read.
    read: usize,
    /// Pages that the server does not have.
    pub(super) missing: Vec<u64>,
}

impl<'a> Get<'a> {
    pub(super) fn new(
        keys: &'a Keys,
        store: &'a str,
        namespace: VmNamespace,
        pages: &'a [PageToGet],
        window: usize,
    ) -> Self {
        let pieces = pieces(pages.iter().map(|page| page.page));
        Self { keys, store, namespace, pages, pieces, window, read: 0, missing: Vec::new() }
    }

    /// Asks for pages as long as there is room for them on the way, and hands them out as they
    /// come. The record is asked for first, and compared before a page is handed out.
    pub(super) fn run(
        &mut self,
        connection: &mut Connection,
        wait: Wait,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), Fail> {
        connection.queue(&Command::new("HGET").arg(self.keys.space(self.namespace.id)).arg("record"));
        let (mut asked, mut on_way) = (self.read, 0);
        let mut checked = false;
        while self.read < self.pieces.len() {
            while let Some(piece) = self.pieces.get(asked) {
                let pages = cost(piece);
                if on_way > 0 && on_way + pages > self.window {
                    break;
                }
                connection.queue(&self.command(piece));
                on_way += pages;
                asked += 1;
            }
            connection.flush(wait)?;
            if !checked {
                let record = connection.reply(wait)?.bytes();
                self.check(record).map_err(Fail::Store)?;
                checked = true;
            }
            on_way -= cost(&self.pieces[self.read]);
            self.hand_out(connection, wait, take)?;
            if wait.is_over() && self.read < self.pieces.len() {
                return Err(Fail::Store(StoreError::TimedOut));
            }
        }
        Ok(())
    }

    fn command(&self, piece: &Piece) -> Command {
        match is_whole(piece) {
            true => Command::new("GET").arg(self.keys.block(self.namespace.id, piece.block)),
            false => read_pages(self.keys, self.namespace.id, piece, self.pages),
        }
    }

    /// Reads the answer for the next piece.
    fn hand_out(
        &mut self,
        connection: &mut Connection,
        wait: Wait,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), Fail> {
        let piece = &self.pieces[self.read];
        let (vm, wanted) = (self.namespace.vm, &self.pages[piece.pages.clone()]);
        let missing = &mut self.missing;
        let mut decide = |page: &PageToGet, value: Option<&[u8]>| match value {
            Some(value) => take(page.page, PageData::new(value)),
            None => missing.push(page.page),
        };
        if is_whole(piece) {
            let block = connection.value(wait, MAX_BLOCK_BYTES)?.unwrap_or_default();
            // from here on the piece counts as read: no page of it is handed out again
            self.read += 1;
            wanted.iter().for_each(|page| decide(page, value_in_block(block, vm, page)));
        } else {
            // kept until the last one has come, so that none is handed out twice
            let mut slots = Vec::with_capacity(wanted.len());
            connection.values(wait, wanted.len(), SLOT_BYTES, |_, slot| slots.push(slot.to_vec()))?;
            self.read += 1;
            wanted.iter().zip(&slots).for_each(|(page, slot)| decide(page, value_in_slot(slot, vm, page)));
        }
        Ok(())
    }

    fn check(&self, record: Option<Vec<u8>>) -> Result<(), StoreError> {
        match decode_record(self.store, self.namespace.id, record)? {
            None => Err(StoreError::Absent(self.namespace.id)),
            Some(record) if record.vm != self.namespace.vm => Err(StoreError::OtherVm(self.namespace.id)),
            Some(_) => Ok(()),
        }
    }
}

fn is_whole(piece: &Piece) -> bool {
    piece.pages.len() >= WHOLE_FROM
}

/// Returns how many pages the answer for a piece brings.
fn cost(piece: &Piece) -> usize {
    if is_whole(piece) { BLOCK_PAGES as usize } else { piece.pages.len() }
}

/// Reads a record that the server has; `None` if it has none.
pub(super) fn decode_record(
    store: &str,
    id: NamespaceId,
    bytes: Option<Vec<u8>>,
) -> Result<Option<Record>, StoreError> {
    let Some(bytes) = bytes else { return Ok(None) };
    let damaged = |cause: Box<dyn std::error::Error + Send + Sync>| StoreError::Damaged {
        what: format!("the record of namespace {id} in {store}"),
        cause,
    };
    match bytes.first_chunk() {
        Some(record) if bytes.len() == Record::BYTES => {
            Record::decode(record).map(Some).map_err(|cause| damaged(cause.into()))
        }
        _ => Err(damaged("it has another length".into())),
    }
}
