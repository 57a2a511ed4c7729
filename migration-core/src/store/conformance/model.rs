//! Checks with messages that are delayed, repeated and reordered, compared with a simple model.

use std::collections::BTreeMap;

use super::{
    DESTINATION, LEASE, Purpose, Random, StoreError, TestStore, VM, VmNamespace, expect_empty, expect_pages, introduce,
    record, try_put,
};

/// The number of sequences that are tried, each with its own namespaces.
const SEQUENCES: u8 = 60;
/// The number of pages of the VM, and the number of generations that are put.
const PAGES: u64 = 6;
const GENERATIONS: u32 = 10;

/// A message to the store.
#[derive(Clone, Debug)]
enum Message {
    Create,
    Renew,
    Put {
        generation: u32,
        pages: Vec<u64>,
    },
    Forget,
    /// A crash of a process that uses the store.
    Crash,
}

/// The expected content of one namespace.
#[derive(Default)]
struct Model {
    exists: bool,
    forgotten: bool,
    newest: BTreeMap<u64, u32>,
}

/// Checks that the store answers as the model does, when each message is delivered one to three
/// times, in any order.
///
/// In half of the sequences one of the messages is a `forget`, and a `create`, a put or a renewal
/// often comes after it.
pub fn rule_10_delayed_repeated_and_reordered_messages_are_harmless(test: &mut dyn TestStore) {
    let room = test.store().room();
    for sequence in 0..SEQUENCES {
        let mut random = Random::new(sequence.into());
        let id = introduce(test, sequence, VM);
        let messages = messages(&mut random, sequence % 2 == 1);
        let mut model = Model::default();
        for (at, message) in messages.iter().enumerate() {
            deliver(test, id, message, &mut model).unwrap_or_else(|wrong| {
                panic!("sequence {sequence}, message {at}, {message:?}: {wrong}\nall messages: {messages:?}")
            });
        }
        compare(test, id, &model);
        test.store().forget(id).expect("it is forgotten");
        assert_eq!(test.store().room(), room, "room after sequence {sequence}");
    }
    expect_empty(test, room);
}

fn messages(random: &mut Random, with_forget: bool) -> Vec<Message> {
    let mut messages = Vec::new();
    for generation in 1..=GENERATIONS {
        let pages: Vec<_> = (0..PAGES).filter(|_| random.below(2) == 0).collect();
        if !pages.is_empty() {
            messages.push(Message::Put { generation, pages });
        }
    }
    messages.push(Message::Renew);
    messages.push(Message::Crash);
    let mut copies: Vec<_> = messages.into_iter().flat_map(|m| vec![m; 1 + random.below(3) as usize]).collect();
    random.shuffle(&mut copies);
    // most sequences begin with the create; one copy of it comes anywhere
    copies.insert(random.below(3) as usize, Message::Create);
    copies.insert(random.below(copies.len() as u64 + 1) as usize, Message::Create);
    if with_forget {
        let half = copies.len() as u64 / 2;
        copies.insert((half + random.below(half)) as usize, Message::Forget);
    }
    copies
}

/// Delivers a message to the store and to the model, and compares their answers.
fn deliver(test: &mut dyn TestStore, id: VmNamespace, message: &Message, model: &mut Model) -> Result<(), String> {
    let store = test.store();
    match message {
        Message::Crash => test.crash_user(),
        Message::Create => match store.create(id.id, &record(Purpose::Attempt), LEASE) {
            Ok(_) if !model.forgotten => model.exists = true,
            Err(StoreError::Forgotten(_)) if model.forgotten => {}
            other => return Err(format!("the answer is {other:?}")),
        },
        Message::Renew => match store.renew(id, DESTINATION, LEASE) {
            Ok(_) if model.exists => {}
            Err(StoreError::Absent(_)) if !model.exists => {}
            other => return Err(format!("the answer is {other:?}")),
        },
        Message::Forget => {
            store.forget(id).map_err(|error| error.to_string())?;
            *model = Model { forgotten: true, ..Model::default() };
        }
        Message::Put { generation, pages } => match try_put(test, id, *generation, pages) {
            Ok(stored) if model.exists => {
                let taken: Vec<_> = pages.iter().map(|&page| model.put(page, *generation)).collect();
                if stored.taken != taken {
                    return Err(format!("taken {:?}, not {taken:?}", stored.taken));
                }
            }
            Err(StoreError::Absent(_)) if !model.exists => {}
            other => return Err(format!("the answer is {other:?}")),
        },
    }
    Ok(())
}

impl Model {
    fn put(&mut self, page: u64, generation: u32) -> bool {
        let newest = self.newest.entry(page).or_insert(generation);
        let taken = *newest <= generation;
        *newest = (*newest).max(generation);
        taken
    }
}

/// Compares every page in every generation.
fn compare(test: &dyn TestStore, id: VmNamespace, model: &Model) {
    if !model.exists {
        assert_eq!(test.store().record(id.id).expect("the store answers"), None);
        return;
    }
    for generation in 0..=GENERATIONS + 1 {
        let (present, absent): (Vec<_>, Vec<_>) = (0..PAGES)
            .map(|page| (page, generation))
            .partition(|(page, generation)| model.newest.get(page) == Some(generation));
        expect_pages(test, id, &present, &absent);
    }
}
