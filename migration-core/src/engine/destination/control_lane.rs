//! The frames of a source on its control lane, and their handling.

use super::{switch_over::Offered, *};

/// Whether a control lane continues after a frame.
pub(super) enum Flow {
    Continue,
    End,
}

impl VmEntry {
    /// Serves a control lane: reads its frames and handles them in order.
    pub(super) fn frames(
        self: &Arc<Self>,
        frames: &mut ControlReader,
        session: &Arc<Session>,
        attachment: u64,
    ) -> Result<(), MigrationError> {
        loop {
            let (epoch, frame) = frames.read()?;
            if let Flow::End = self.frame(session, attachment, epoch, frame)? {
                return Ok(());
            }
        }
    }

    /// Handles the end of a control lane, with the result of serving it.
    pub(super) fn ended(
        self: &Arc<Self>,
        session: &Arc<Session>,
        attachment: u64,
        peer: &str,
        served: Result<(), MigrationError>,
    ) {
        let Err(error) = served else { return };
        if !matches!(error, MigrationError::Link { .. } | MigrationError::Peer { .. }) {
            // best effort: the lane ends either way
            let _ = session.send_control(&Control::error(error.code(), describe(&error)));
        }
        // if a bulk lane has failed, its failure is the cause, and the error on this lane only a
        // consequence
        let why = session.over().unwrap_or_else(|| describe(&error));
        let link = session.link();
        self.lost(attachment, &why);
        self.common.bad_peer(peer, &why);
        if self.current(attachment).is_ok() {
            self.watch_source(session, link);
        }
    }

    pub(super) fn frame(
        self: &Arc<Self>,
        session: &Arc<Session>,
        attachment: u64,
        epoch: u32,
        frame: Control,
    ) -> Result<Flow, MigrationError> {
        let mut state = lock(&self.state);
        if state.attachment != attachment {
            // a newer control lane speaks for the session, or a newer session has replaced it
            return Ok(Flow::End);
        }
        if matches!(frame, Control::Missing { .. } | Control::PostCopy { .. }) && session.pager.is_none() {
            return Err(DecodeError::invalid("post-copy", "it is not agreed on").into());
        }
        session.allowance.frame(&frame, session.ram.layout().pages())?;
        match state.machine.handle(epoch, frame)? {
            DestinationAction::None | DestinationAction::Build { .. } => {}
            DestinationAction::StoreTable(part) => {
                drop(state);
                self.store_table(session, &part)?;
            }
            DestinationAction::Located(located) => {
                drop(state);
                self.located(session, &located)?;
            }
            DestinationAction::Vacated(number) => session.vacated(number),
            DestinationAction::EntryLost(entry) => {
                drop(state);
                self.entry_lost(session, entry);
            }
            DestinationAction::Pong => {
                drop(state);
                // best effort: a source that has closed the lane may have sent *done* before, which
                // must still be read
                let _ = session.send_control(&Control::Pong);
            }
            DestinationAction::LoadPiece(piece) => {
                drop(state);
                let mut vm = session.vm.borrow().ok_or_else(no_vm)?;
                vm.vm().load_piece(&piece).map_err(MigrationError::vm("loading a piece of device state"))?;
            }
            DestinationAction::Missing { first, bitmap } => add_missing(&mut lock(&session.listed), first, &bitmap)?,
            DestinationAction::Load { generation, state: bytes, post_copy } => {
                drop(state);
                return self.load(session, attachment, Offered { generation, state: bytes, post_copy });
            }
            DestinationAction::Start { running } => {
                drop(state);
                self.run(session, attachment, running)?;
            }
            DestinationAction::AnswerRunning => {
                drop(state);
                // another control lane may have caused the start, which may not be finished yet
                session.wait_started();
                self.notify(session.id, Notice::LinkFound);
                self.answer(session, attachment)?;
            }
            DestinationAction::Discard(why) => {
                let given_up = state.session.take();
                drop(state);
                self.discard(given_up, &why);
                return Ok(Flow::End);
            }
            DestinationAction::Finish => {
                drop(state);
                if let Some(protection) = &session.protection {
                    self.unprotect(protection);
                }
                self.source_is_done(session);
                return Ok(Flow::End);
            }
        }
        Ok(Flow::Continue)
    }
}
