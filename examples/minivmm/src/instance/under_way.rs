//! Requests of users to the migration or snapshot under way, and the answers about it to other
//! requests.

use super::*;

/// The migration or snapshot under way.
pub(super) struct UnderWay {
    /// The strategy; `None` for a snapshot.
    pub(super) strategy: Option<String>,
    /// The target: an address, or a file.
    pub(super) to: String,
    pub(super) since: Instant,
    /// The bandwidth limit of a migration.
    pub(super) limiter: Option<Limiter>,
}

impl UnderWay {
    pub(super) fn migration(strategy: &str, to: &Address, limiter: Limiter) -> Self {
        Self { strategy: Some(strategy.into()), to: to.to_string(), since: Instant::now(), limiter: Some(limiter) }
    }

    pub(super) fn snapshot(out: &Path) -> Self {
        Self { strategy: None, to: out.display().to_string(), since: Instant::now(), limiter: None }
    }

    fn text(&self) -> String {
        let what = self.strategy.as_ref().map_or("a snapshot".into(), |strategy| format!("a {strategy} migration"));
        format!("{what} to {} has been under way for {:.1} s", self.to, self.since.elapsed().as_secs_f64())
    }
}

/// Returns the bandwidth in bits per second, or null for no limit.
pub(super) fn bandwidth_to_json(bandwidth: Bandwidth) -> Value {
    bandwidth.bits_per_second().map_or(Value::Null, |bits| json!(bits))
}

impl State {
    /// Returns why the request `wish` is refused now: what this minivmm does, and what the user can
    /// do about it.
    pub(super) fn busy(&self, wish: &str) -> String {
        let Some(under_way) = &self.under_way else { return format!("{wish}: this minivmm is {}", self.role.name()) };
        let progress = self.progress.as_ref();
        let stage = progress.map(|p| format!(" ({:?}, round {})", p.phase, p.round).to_lowercase()).unwrap_or_default();
        let text = under_way.text();
        let serves = progress.is_some_and(|p| p.phase == SourcePhase::Serving);
        let ctl = |command: &str| match &self.place {
            Some(place) => format!("`minivmm ctl --control {} {command}`", place.control.display()),
            None => format!("`minivmm ctl {command}`"),
        };
        let next = match self.role {
            Role::InDoubt => format!(
                "its link is lost after the hand-over, so it cannot be cancelled; {} tries another address",
                ctl("recover --to URL")
            ),
            _ if serves => "the VM runs at the destination already, which still gets pages from here".to_owned(),
            _ => format!("{} cancels it", ctl("cancel")),
        };
        format!("{wish}: {text}{stage}; {next}")
    }

    /// Returns the bandwidth limit of the migration under way, for its progress and its report.
    pub(super) fn bandwidth(&self) -> Value {
        let limiter = self.under_way.as_ref().and_then(|under_way| under_way.limiter.as_ref());
        limiter.map_or(Value::Null, |limiter| bandwidth_to_json(limiter.bandwidth()))
    }
}

impl Instance {
    /// Returns the VM if it is here, even if it is about to leave. The machine itself refuses
    /// requests that come too late.
    pub(super) fn not_gone(&self, wish: &str) -> Result<Arc<Machine>, String> {
        let state = self.lock();
        match (state.role, &state.machine) {
            (Role::Home | Role::Saving | Role::Outgoing | Role::InDoubt, Some(machine)) => Ok(machine.clone()),
            (role, _) => Err(format!("{wish}: no VM is at rest here, this minivmm is {}", role.name())),
        }
    }

    pub(super) fn post_copy(&self) -> Result<Value, String> {
        self.when_ready("post-copy", |controller| match controller.post_copy() {
            Err(NoPostCopy::NotYet) => None,
            other => Some(other.map_err(|why| why.to_string())),
        })
    }

    pub(super) fn switch_over(&self) -> Result<Value, String> {
        self.when_ready("switch-over", |controller| match controller.switch_over() {
            Err(NoSwitchOver::NotYet) => None,
            other => Some(other.map_err(|why| why.to_string())),
        })
    }

    /// Sends a request to the migration under way. If `ask` returns `None`, the request is too
    /// early, and it is repeated after each phase of the migration.
    fn when_ready(
        &self,
        wish: &str,
        mut ask: impl FnMut(&Controller) -> Option<Result<(), String>>,
    ) -> Result<Value, String> {
        let mut state = self.lock();
        loop {
            let controller = state.controller.as_ref().ok_or_else(|| format!("{wish}: no migration is under way"))?;
            match ask(controller) {
                Some(Ok(())) => return Ok(json!({"asked": true})),
                // the next phase of the migration, or its end, wakes this thread
                None => state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner()),
                Some(Err(why)) => return Err(format!("{wish}: {why}")),
            }
        }
    }

    /// Changes the limits of the migration or snapshot under way. Changes all that are given, or
    /// none.
    pub(super) fn tune(&self, bandwidth: Option<u64>, downtime_limit: Option<Duration>) -> Result<Value, String> {
        let mut state = self.lock();
        let (Some(controller), Some(under_way)) = (&state.controller, &state.under_way) else {
            return Err("tune: no migration is under way".into());
        };
        if bandwidth.is_some() && under_way.limiter.is_none() {
            return Err("tune: a snapshot is being taken, which has no bandwidth limit; nothing was changed".into());
        }
        if let Some(limit) = downtime_limit {
            controller.set_downtime_limit(limit).map_err(|why| format!("tune: {why}; nothing was changed"))?;
        }
        if let (Some(bits), Some(limiter)) = (bandwidth, &under_way.limiter) {
            limiter.set_bandwidth(Bandwidth::from_bits_per_second(bits));
        }
        if let (Some(limit), Some(progress)) = (downtime_limit, &mut state.progress) {
            // the next progress report will contain the new limit, too
            progress.downtime_limit = limit;
        }
        let limit = downtime_limit.or(state.progress.as_ref().map(|p| p.downtime_limit));
        Ok(json!({"bandwidth_bits": state.bandwidth(), "downtime_limit_ms": limit.map(report::ms)}))
    }
}
