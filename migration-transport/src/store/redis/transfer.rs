//! How pages travel: puts as one transaction, gets as requests that follow each other.

use migration_core::store::{NamespaceId, PageData, PageToGet, PageToPut, Record, StoreError, VmNamespace};

use redis::{Cmd, RedisWrite, Value};

use super::{
    blocks::{
        BLOCK_OVERHEAD, BLOCK_PAGES, MAX_BLOCK_BYTES, Piece, SLOT_BYTES, index, pieces, value_in_block, value_in_slot,
        write_block,
    },
    connection::{Connection, Wait},
    fail::{Fail, parse},
    scripts::{Answer, Keys, PUT, read_pages},
};

/// Bytes of blocks that are collected before they are sent: few enough to be in the processor's
/// cache since their checksums were made.
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
        connection.queue(&redis::cmd("MULTI"));
        let mut set = Cmd::new();
        for (number, piece) in pieces.iter().enumerate() {
            let pages = &self.pages[piece.pages.clone()];
            set.clear();
            set.arg("SET").arg(format!("{stage}{number}"));
            let written = write_block(&mut set.writer_for_next_arg(), self.namespace.vm, self.generation, pages);
            written.map_err(Fail::asking)?;
            connection.queue(&set);
            if connection.unsent() >= SEND_BYTES {
                connection.flush(wait)?;
            }
        }
        connection.queue(&self.script(&pieces, &stage));
        connection.queue(&redis::cmd("EXEC"));
        connection.flush(wait)?;
        // the answers to MULTI, each SET and the script: that they were understood
        let mut refused = None;
        for _ in 0..pieces.len() + 2 {
            if let Value::ServerError(error) = connection.any_answer(wait)? {
                refused.get_or_insert(error);
            }
        }
        let done = connection.any_answer(wait)?;
        match (refused, done) {
            // that of the transaction only says that it was given up
            (Some(error), _) | (None, Value::ServerError(error)) => Err(Fail::answer(&error)),
            (None, Value::Array(mut answers)) => match answers.pop() {
                Some(Value::ServerError(error)) => Err(Fail::answer(&error)),
                Some(answer) => Answer::new(answer),
                None => Err(Fail::nonsense("a transaction without answers")),
            },
            (None, _) => Err(Fail::nonsense("a transaction without answers")),
        }
    }

    fn script(&self, pieces: &[Piece], stage: &str) -> Cmd {
        let Self { keys, namespace, .. } = self;
        let id = namespace.id;
        let mut command = redis::cmd("EVAL");
        command.arg(PUT).arg(4 + 2 * pieces.len());
        command.arg(keys.store()).arg(keys.space(id)).arg(keys.blocks(id)).arg(keys.used());
        for (number, piece) in pieces.iter().enumerate() {
            command.arg(format!("{stage}{number}")).arg(keys.block(id, piece.block));
        }
        // above what a double of the server's Lua can count, there is no limit
        command.arg(&namespace.vm.0[..]).arg(self.generation).arg(self.limit.min(1 << 53));
        command.arg(BLOCK_OVERHEAD).arg(SLOT_BYTES).arg(BLOCK_PAGES);
        for piece in pieces {
            let of_page = |page: &PageToPut<'_>| {
                let [low, high] = (page.value.len() as u16).to_le_bytes();
                [index(page.page), low, high]
            };
            let pages: Vec<u8> = self.pages[piece.pages.clone()].iter().flat_map(of_page).collect();
            command.arg(piece.block).arg(pages);
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
        connection.queue(redis::cmd("HGET").arg(self.keys.space(self.namespace.id)).arg("record"));
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
                let record = parse(connection.answer(wait)?)?;
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

    fn command(&self, piece: &Piece) -> Cmd {
        match is_whole(piece) {
            true => redis::cmd("GET").arg(self.keys.block(self.namespace.id, piece.block)).take(),
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
        let answer = connection.answer(wait)?;
        if is_whole(piece) {
            let block = parse::<Option<Vec<u8>>>(answer)?.unwrap_or_default();
            if block.len() > MAX_BLOCK_BYTES {
                return Err(Fail::nonsense("a block that is too long"));
            }
            // from here on the piece counts as read: no page of it is handed out again
            self.read += 1;
            wanted.iter().for_each(|page| decide(page, value_in_block(&block, vm, page)));
        } else {
            let slots: Vec<Vec<u8>> = parse(answer)?;
            if slots.len() != wanted.len() {
                return Err(Fail::nonsense("another number of pages"));
            }
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
