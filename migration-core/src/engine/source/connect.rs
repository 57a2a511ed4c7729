//! Setting up a session: the control lane, the features that both sides agree on, and the other
//! lanes.

use super::*;
use crate::{channel::Channel, engine::limits::check_description, vm::VmDescription, wire::FEATURE_STORES};

impl Engine<'_> {
    pub(super) fn connect(&mut self) -> Result<(), MigrationError> {
        if let Some(why) = self.vm.blocked(self.strategy.name) {
            return Err(MigrationError::Blocked(why));
        }
        let description = self.vm.describe().map_err(MigrationError::vm("describing the VM"))?;
        check_description(&description)?;
        self.id = description.id;
        let stores = self.options.fail_safe.iter().flat_map(|f| [&f.reverse, &f.forward]).flatten();
        if stores.into_iter().any(|store| lock(store).latest().is_some()) {
            return Err(MigrationError::Blocked(
                "the checkpoint store holds a checkpoint already, of what is not known".into(),
            ));
        }
        if self.strategy.shares_ram {
            self.check_sharing(&description)?;
            // Lanes carry pages, and no page moves, so one lane is enough.
            self.report.streams = 1;
            self.options.spawner.assume(Role::HandOver, self.options.impact);
        }
        self.attach(LaneKind::Control)?;
        let features = self.wanted_features();
        let (streams, strategy) = (self.report.streams, self.strategy.name.to_owned());
        self.send_control(&Control::Hello(Box::new(Hello { features, streams, strategy, vm: description })))?;
        if self.strategy.shares_ram {
            self.share_ram()?;
        }
        let timeout = self.options.setup_timeout;
        let silent = format!("it was silent for the setup time-out of {timeout:?}");
        let welcome =
            self.wait(&format!("the destination to build the VM: {silent}"), timeout, |event| match event {
                SourceEvent::Welcomed(welcome) => Some(welcome),
                _ => None,
            })?;
        self.accept(&welcome)?;
        if let Err(error) = self.open_lanes() {
            // The destination may have sent the reason why it accepts no further lane.
            return Err(if matches!(error, MigrationError::Link { .. }) { self.last_words(error) } else { error });
        }
        let what = format!("the destination to take the lanes: {silent}");
        let load = self.wait(&what, timeout, |event| match event {
            SourceEvent::Prepared { load } => Some(load),
            _ => None,
        })?;
        self.measured.calibration.loads_in(load);
        if self.peer.features & FEATURE_CHECKPOINTS != 0 {
            self.await_introduction()?;
        }
        // This ping is queued like those that follow while its answer is awaited: answers come in
        // the order of the pings.
        self.peer.last_ping = Instant::now();
        self.peer.pings.push_back(self.peer.last_ping);
        self.send_control(&Control::Ping)?;
        self.wait("an answer", self.options.idle_timeout, |event| matches!(event, SourceEvent::Pong).then_some(()))?;
        self.vm.start().map_err(MigrationError::vm("starting the devices' migration"))?;
        self.check_state_limits()?;
        self.report.setup = self.start.elapsed();
        self.report_phase();
        Ok(())
    }

    /// Checks that RAM can be shared with a destination of this machine, before a destination is
    /// asked.
    fn check_sharing(&mut self, description: &VmDescription) -> Result<(), MigrationError> {
        let blocked = |why: String| Err(MigrationError::Blocked(why));
        if self.vm.tracker().is_active() && self.pages() > dirty_log::MAX_PAGES {
            return blocked(format!(
                "the dirty log of more than {} pages does not go along: end it before",
                dirty_log::MAX_PAGES
            ));
        }
        match self.vm.shared_ram() {
            Ok(files) if files.len() == description.layout.regions().len() => {}
            Ok(files) => {
                return blocked(format!(
                    "{} memory files for {} regions",
                    files.len(),
                    description.layout.regions().len()
                ));
            }
            Err(why) => return blocked(describe(&why)),
        }
        if !self.connector().carries_files() {
            let address = self.connector().address();
            let way = "over a Unix socket (unix:PATH) with nothing around it";
            return blocked(format!("RAM is shared {way}, which the link to {address} is not"));
        }
        if self.options.fail_safe.is_some() {
            return blocked("no checkpoints are taken of RAM that is shared: leave fail-safe post-copy out".into());
        }
        Ok(())
    }

    /// Sends the files of the memory that backs RAM.
    fn share_ram(&mut self) -> Result<(), MigrationError> {
        let files = self.vm.shared_ram().map_err(MigrationError::vm("sharing RAM"))?;
        match self.peer.control.as_mut().map(|control| control.send_files(&files)) {
            Some(Err(error @ MigrationError::Link { .. })) => Err(self.last_words(error)),
            Some(sent) => sent,
            None => Ok(()),
        }
    }

    /// Records the answers that controllers get to their requests from now on.
    pub(super) fn report_controllers(&self) {
        let mut requests = lock(&self.requests);
        requests.post_copy = match self.report.demand_lanes {
            0 if self.options.demand_lanes == 0 => Err(NoPostCopy::NoLanes),
            0 => Err(NoPostCopy::NotAgreed),
            // The strategy has decided how it hands over.
            _ if self.guest.paused => Err(NoPostCopy::TooLate),
            _ => Ok(()),
        };
        requests.switch_over = match self.guest.paused {
            _ if !self.strategy.can_switch_over => Err(NoSwitchOver::Strategy),
            true => Err(NoSwitchOver::TooLate),
            false => Ok(()),
        };
        requests.tuning = if self.guest.paused { Err(NoTuning::TooLate) } else { Ok(()) };
    }

    pub(super) fn connector(&self) -> &dyn Connector {
        self.peer.elsewhere.as_deref().unwrap_or(self.peer.connector)
    }

    fn wanted_features(&self) -> u32 {
        if self.strategy.shares_ram {
            return FEATURE_SHARED_RAM;
        }
        let crc = if self.options.payload_crc { FEATURE_PAYLOAD_CRC } else { 0 };
        // A page that is in a store may be left at the source alone, without its whole huge page.
        let huge = if self.rounds.stored().is_some() { 0 } else { FEATURE_HUGE_BLOCKS };
        let post_copy = if self.options.demand_lanes > 0 { FEATURE_POST_COPY | huge } else { 0 };
        let checkpoints = if self.options.fail_safe.is_some() { FEATURE_CHECKPOINTS } else { 0 };
        let stores = if self.uses_stores && post_copy != 0 { FEATURE_STORES } else { 0 };
        crc | post_copy | checkpoints | stores
    }

    /// Returns the sender by which the threads of the present link pass on what the destination
    /// sends.
    fn peer_inputs(&self) -> PeerInputs {
        PeerInputs::new(self.tx.clone(), self.inputs.waiting.clone(), self.peer.link_ended.clone())
    }

    /// Returns an error if the user has cancelled, or the guest has ended, while a channel was
    /// opened. Frames that the destination has sent meanwhile stay queued for the calls that wait
    /// for them.
    fn hear_cancel(&mut self) -> Result<(), MigrationError> {
        if !self.machine.owns() {
            return Ok(());
        }
        match self.inputs.find(|input| matches!(input, Input::Cancel(_) | Input::VmEnded(_) | Input::StageOff)) {
            Some(Input::Cancel(why)) => self.end_by(Over::Cancelled(why)),
            Some(Input::VmEnded(why)) => self.end_by(Over::Ended(why)),
            Some(Input::StageOff) => self.end_by(Over::Off),
            _ => Ok(()),
        }
    }

    fn open_channel(&self, kind: LaneKind) -> io::Result<Box<dyn Channel>> {
        match &self.peer.hurry {
            Some(hurry) => self.connector().connect_within(kind, hurry.connect),
            None => self.connector().connect_as(kind),
        }
    }

    /// Opens a control lane, and starts a thread that reads it.
    pub(super) fn attach(&mut self, kind: LaneKind) -> Result<(), MigrationError> {
        self.hear_cancel()?;
        let peer = self.connector().address();
        let Halves { mut reader, mut writer, closer } =
            self.open_channel(kind).and_then(|channel| channel.split()).map_err(MigrationError::link(&peer))?;
        // The destination answers pings, so silence means that the link is lost. The longer
        // time-out is needed while the destination builds the VM, because it answers nothing then.
        let patience = self.options.idle_timeout.max(self.options.setup_timeout);
        reader.set_idle_timeout(Some(patience)).map_err(MigrationError::link(&peer))?;
        writer.set_idle_timeout(Some(self.options.idle_timeout)).map_err(MigrationError::link(&peer))?;
        let preamble = Preamble::new(kind, 0, self.peer.session);
        writer.write_all(&preamble.encode(), &[]).map_err(MigrationError::link(&peer))?;
        let bytes = self.measured.counters.wire_bytes.clone();
        bytes.fetch_add(Preamble::LEN as u64, Ordering::Relaxed);
        self.peer.control = Some(ControlWriter::new(writer, peer.clone(), bytes.clone()));
        self.peer.closers.push(closer);
        let mut control = ControlReader::of_destination(reader, peer, bytes);
        self.peer.link_ended = Arc::default();
        let tx = self.peer_inputs();
        let body = Box::new(move || {
            loop {
                let input = match control.read() {
                    Ok((epoch, frame)) => Input::Control(epoch, frame),
                    Err(error) => Input::ControlLost(error),
                };
                let lost = matches!(input, Input::ControlLost(_));
                if tx.send(input).is_err() || lost {
                    return;
                }
            }
        });
        let role = if self.strategy.shares_ram { Role::HandOver } else { Role::Control };
        self.spawn(role, "mig-control", body)
    }

    fn accept(&mut self, welcome: &Welcome) -> Result<(), MigrationError> {
        let lanes = welcome.streams;
        let unasked = welcome.features & !self.wanted_features();
        if welcome.version != VERSION || !(1..=self.report.streams).contains(&lanes) || unasked != 0 {
            let text =
                format!("it chose version {}, {lanes} streams, features {:#x}", welcome.version, welcome.features);
            return Err(MigrationError::Peer { code: ErrorCode::Version, text });
        }
        if self.strategy.shares_ram && welcome.features & FEATURE_SHARED_RAM == 0 {
            return Err(MigrationError::Blocked("the destination does not share RAM: its version is too old".into()));
        }
        (self.peer.session, self.peer.features, self.report.streams) = (welcome.session, welcome.features, lanes);
        if welcome.features & FEATURE_POST_COPY != 0 {
            self.report.demand_lanes = self.options.demand_lanes.min(MAX_DEMAND_LANES);
        }
        self.report_controllers();
        self.set_block(self.peer.features & FEATURE_HUGE_BLOCKS != 0 || self.options.huge == HugePages::Whole);
        Ok(())
    }

    pub(in crate::engine) fn open_lanes(&mut self) -> Result<(), MigrationError> {
        for index in 0..self.report.streams {
            let (lane, _) = self.open_lane(LaneKind::Bulk, index)?;
            let (jobs, work) = mpsc::channel();
            let tx = self.tx.clone();
            self.spawn(Role::Bulk, &format!("mig-bulk-{index}"), Box::new(move || lane.run(work, tx)))?;
            self.peer.lanes.push(jobs);
        }
        for index in 0..self.report.demand_lanes {
            let (lane, mut reader) = self.open_lane(LaneKind::Demand, index)?;
            // The lane is silent as long as the guest does not fault. Whether the link works is
            // observed on the control lane.
            reader.set_idle_timeout(None).map_err(MigrationError::link(&lane.peer))?;
            let (demand, tx) = (DemandLane { lane, reader, left: self.post_copy.left.clone() }, self.peer_inputs());
            self.spawn(Role::Demand, &format!("mig-demand-{index}"), Box::new(move || demand.run(tx)))?;
        }
        if let Some(fail_safe) =
            self.options.fail_safe.clone().filter(|_| self.peer.features & FEATURE_CHECKPOINTS != 0)
        {
            let (lane, mut reader) = self.open_lane(LaneKind::Checkpoint, 0)?;
            reader.set_idle_timeout(None).map_err(MigrationError::link(&lane.peer))?;
            let checkpoint_receiver = CheckpointReceiver {
                reader,
                writer: lane.writer,
                peer: lane.peer,
                ram: lane.ram,
                fail_safe,
                identity: self.vm.identity(),
                kept: self.fail_safe.kept.clone(),
                wire_bytes: self.measured.counters.wire_bytes.clone(),
                observer: self.options.observer.clone(),
                sent: 0,
                zeros: PageSet::empty(self.report.pages.total),
            };
            let tx = self.peer_inputs();
            self.spawn(Role::Control, "mig-checkpoint", Box::new(move || checkpoint_receiver.run(tx)))?;
        }
        Ok(())
    }

    fn open_lane(&mut self, kind: LaneKind, index: u16) -> Result<(Lane, Box<dyn ReadHalf>), MigrationError> {
        self.hear_cancel()?;
        let peer = self.connector().address();
        let Halves { mut writer, reader, closer } =
            self.open_channel(kind).and_then(|channel| channel.split()).map_err(MigrationError::link(&peer))?;
        writer.set_idle_timeout(Some(self.options.idle_timeout)).map_err(MigrationError::link(&peer))?;
        let preamble = Preamble::new(kind, index, self.peer.session);
        writer.write_all(&preamble.encode(), &[]).map_err(MigrationError::link(&peer))?;
        self.measured.counters.wire_bytes.fetch_add(Preamble::LEN as u64, Ordering::Relaxed);
        self.peer.closers.push(closer);
        let lane = Lane {
            index,
            lanes: self.report.streams,
            ram: self.ram.clone(),
            stored: self.rounds.stored().map(|stored| stored.memory.clone()),
            writer,
            peer,
            sequence: 0,
            payload_crc: self.peer.features & FEATURE_PAYLOAD_CRC != 0,
            whole_blocks: self.peer.features & FEATURE_HUGE_BLOCKS != 0,
            counters: self.measured.counters.clone(),
            writing: Duration::ZERO,
            piece: FIRST_PIECE,
        };
        Ok((lane, reader))
    }

    fn spawn(&mut self, role: Role, name: &str, body: Box<dyn FnOnce() + Send>) -> Result<(), MigrationError> {
        let thread = self
            .options
            .spawner
            .spawn(role, self.options.impact, name, body)
            .map_err(|cause| MigrationError::Thread { role: "a lane", cause })?;
        self.peer.threads.push(thread);
        Ok(())
    }

    /// Waits until the destination has sent its identity. Without it this side would not know which
    /// host to fence, and the VM would not be protected.
    fn await_introduction(&mut self) -> Result<(), MigrationError> {
        let deadline = Instant::now() + self.options.setup_timeout;
        while lock(&self.fail_safe.kept.identity).is_none() {
            if let Some(Input::Control(epoch, frame)) = self.next_input(deadline)? {
                self.frame(epoch, frame)?;
            }
            self.in_time(deadline, "the destination to introduce itself")?;
        }
        Ok(())
    }
}
