//! What happens by the clock: reports, plans, gaps for offline work, samples, faults.

use tandem_batching::pace::OFFLINE_SHARE;

use super::*;

impl Cluster<'_> {
    pub(super) fn handle(&mut self, event: Event) {
        match event {
            Event::Step { worker, life } if self.workers[worker as usize].life == life => {
                self.step_ends(worker as usize);
            }
            Event::Step { .. } => {} // of a start that is over
            Event::Prompt { job, leg } => {
                let at = self.jobs[job as usize];
                if at.leg == leg && at.stage == Stage::Prefill {
                    self.take_prompt(job, at.worker as usize);
                }
            }
            Event::Kv { job, leg } if self.jobs[job as usize].leg == leg => self.kv_arrives(job),
            Event::Again { job, leg } if self.jobs[job as usize].leg == leg => self.place(job),
            Event::Kv { .. } | Event::Again { .. } => {} // of a placement that is over
            Event::Report { worker } => self.report(worker as usize),
            Event::Deliver { worker } => self.deliver(worker as usize),
            Event::Plan => self.plan_roles(),
            Event::Gaps => self.fill_gaps(),
            Event::Sample => self.sample(),
            Event::Fault { number } => self.fault(number as usize),
            Event::Up { worker } => self.comes_up(worker as usize),
        }
    }

    fn kv_arrives(&mut self, id: JobId) {
        let job = &self.jobs[id as usize];
        let (from, worker) = (job.worker as usize, job.to as usize);
        self.workers[from].batcher.release(id);
        self.workers[from].dirty = true;
        if self.options.as_reference {
            self.jobs[id as usize].worker = worker as u32;
            self.workers[worker].inbound.push_back(id);
            self.let_in(worker);
            return self.kick(worker);
        }
        let tokens = self.workload.arrivals[id as usize].input + self.jobs[id as usize].made;
        self.left_arriving(worker, tokens);
        let online = u32::from(self.workload.arrivals[id as usize].class == ServiceClass::Online);
        self.workers[from].online = self.workers[from].online.saturating_sub(online);
        self.workers[worker].online += online;
        let job = &mut self.jobs[id as usize];
        (job.stage, job.worker) = (Stage::Decode, worker as u32);
        let job = self.decode_job(id);
        self.workers[worker].batcher.join(job);
        if self.index.is_some() {
            self.put(worker, self.blocks(id));
        }
        // Pages of the lease are free now: prompts or decodes may wait for them.
        if !self.workers[from].inbound.is_empty() {
            self.let_in(from);
        }
        self.kick(from);
        self.kick(worker);
    }

    fn report(&mut self, worker: usize) {
        let (stale, now) = (self.options.stale, self.now);
        let w = &mut self.workers[worker];
        if w.up && now >= w.silent_until {
            let report = w.report(now);
            w.reports.push_back(report);
            self.at(now + stale * 3 / 4, Event::Deliver { worker: worker as u32 });
        }
        let every = (stale / 4).max(Duration::from_millis(1));
        if self.next < self.workload.arrivals.len() || self.open_online > 0 {
            self.at(now + every, Event::Report { worker: worker as u32 });
        }
    }

    fn deliver(&mut self, worker: usize) {
        let w = &mut self.workers[worker];
        let Some(report) = w.reports.pop_front() else { return };
        for ledger in &mut w.ledgers {
            ledger.report(report.load, report.made);
        }
        self.view[worker].kv_usage = report.kv_usage;
    }

    fn plan_roles(&mut self) {
        self.take_models();
        for number in 0..self.workers.len() {
            let pace = self.pace(self.model(number));
            self.workers[number].batcher.set_pace(pace);
        }
        if self.options.planner {
            self.flip_roles();
        }
        if self.next < self.workload.arrivals.len() || self.open_online > 0 {
            self.at(self.now + PLANNER_TICK, Event::Plan);
        }
    }

    /// What the workers have learnt goes into the view.
    fn take_models(&mut self) {
        if !self.learns() {
            return;
        }
        for (worker, candidate) in self.workers.iter().zip(&mut self.view) {
            candidate.model = worker.predictor.as_ref().map(Predictor::step_time);
        }
        let prompts = |role: &Role| *role != Role::Decode;
        let any = self.workers.iter().any(|worker| prompts(&worker.role));
        let those = self.workers.iter().zip(&self.view).filter(|(worker, _)| !any || prompts(&worker.role));
        let models: Vec<StepTime> = those.filter_map(|(_, candidate)| candidate.model).collect();
        let mean = |of: fn(&StepTime) -> f64| models.iter().map(of).sum::<f64>() / models.len() as f64;
        self.predicted = StepTime {
            a0: mean(|m| m.a0),
            a1: mean(|m| m.a1),
            a2: mean(|m| m.a2),
            b0: mean(|m| m.b0),
            b1: mean(|m| m.b1),
            b2: mean(|m| m.b2),
        };
    }

    fn flip_roles(&mut self) {
        self.refresh(0);
        let load = self.observer.load(self.now);
        let plan = self.planner.plan(&self.view, &load, self.now);
        for flip in plan.flips {
            let worker = self.view.iter().position(|c| c.worker == flip.worker).expect("it was shown");
            self.workers[worker].role = flip.to;
            self.view[worker].role = flip.to;
            self.outcome.flips += 1;
            self.outcome.flip_log.push((self.now, worker as u32, flip.to));
            self.log(6, worker as u64, flip.to as u64);
        }
    }

    /// Offline work goes where there is a gap.
    fn fill_gaps(&mut self) {
        let slack = self.options.offline == Offline::Slack;
        let target = self.options.per_token.as_secs_f64();
        for worker in 0..self.workers.len() {
            while let Some(&id) = self.offline.front() {
                let w = &self.workers[worker];
                let (rows, context) = w.batcher.decodes();
                let (used, total) = w.batcher.blocks();
                let tokens = self.workload.arrivals[id as usize].input;
                let step = self.model(worker).step(
                    f64::from(rows + 1),
                    0.0,
                    context as f64 + f64::from(tokens) + 256.0,
                );
                let usage = f64::from(used) / f64::from(total.max(1));
                let room = usage + f64::from(tokens + 512) / (f64::from(total) * 32.0) < 0.8;
                let queue_short = w.batcher.prompts() < 2;
                let gap = if slack {
                    let decodes_online = w.batcher.decodes().0 as usize > self.offline_open[worker].len();
                    // Where online sequences decode, steps stay well under their target.
                    let limit = if decodes_online { OFFLINE_SHARE * target } else { 2.0 * target.max(0.02) };
                    queue_short && step < limit && w.inbound.is_empty()
                } else {
                    self.open_online == 0 && queue_short
                };
                if !w.up || !gap || !room {
                    break;
                }
                self.offline.pop_front();
                self.offline_open[worker].push(id);
                let request = self.request(id);
                self.start_prefill(id, worker, &request);
            }
        }
        let more = !self.offline.is_empty() || self.offline_open.iter().any(|open| !open.is_empty());
        if more {
            self.at(self.now + OFFLINE_TICK, Event::Gaps);
        }
    }

    fn sample(&mut self) {
        let (met, all) = std::mem::take(&mut self.sampled);
        let of = |role| self.workers.iter().filter(|w| w.up && w.role == role).count() as u32;
        let rows: u32 = self.workers.iter().map(|w| w.batcher.decodes().0).sum();
        let queue: f64 = self.workers.iter().map(|w| w.batcher.queue_seconds().1).sum();
        self.outcome.samples.push(Sample {
            at: self.now,
            attainment: if all > 0 { met as f64 / all as f64 } else { f64::NAN },
            ended: all as u32,
            queue_seconds: queue,
            decodes: rows,
            roles: [of(Role::Prefill), of(Role::Decode), of(Role::Mixed)],
        });
        if self.next < self.workload.arrivals.len() || self.open_online > 0 {
            self.at(self.now + Duration::from_secs(5), Event::Sample);
        }
    }

    fn fault(&mut self, number: usize) {
        let (_, worker, fault) = self.options.faults[number];
        if worker >= self.workers.len() || !self.workers[worker].up {
            return;
        }
        self.log(7, worker as u64, number as u64);
        match fault {
            Fault::Slow(factor, lasts) => self.workers[worker].slow = (factor.max(0.0), self.now + lasts),
            Fault::Silent(lasts) => self.workers[worker].silent_until = self.now + lasts,
            Fault::Crash(down) => {
                let w = &mut self.workers[worker];
                w.up = false;
                w.busy = false;
                w.measured = None;
                w.life += 1;
                w.online = 0;
                w.cache.clear();
                w.cache_sequence = 0;
                w.reports.clear();
                w.ledgers.fill(Ledger::default());
                let mut lost = w.batcher.clear();
                w.dirty = true;
                // Prompts whose prefix is on its way, and decodes on theirs, have no entry in the batcher yet.
                for (id, job) in self.jobs.iter().enumerate() {
                    let here = job.stage == Stage::Prefill && job.worker as usize == worker;
                    if here || (job.stage == Stage::Moving && job.to as usize == worker) {
                        lost.push(id as JobId);
                    }
                }
                lost.sort_unstable();
                lost.dedup();
                self.view[worker].role = Role::Encode; // nobody's candidate
                if let Some(index) = &mut self.index {
                    index.forget(&self.view[worker].worker);
                }
                for id in lost {
                    self.lost_by_fault(id, worker);
                }
                self.at(self.now + down, Event::Up { worker: worker as u32 });
            }
        }
    }

    fn lost_by_fault(&mut self, id: JobId, worker: usize) {
        let arrival = &self.workload.arrivals[id as usize];
        if self.jobs[id as usize].stage == Stage::Over {
            return;
        }
        if self.jobs[id as usize].stage == Stage::Moving {
            self.stop_moving(id);
        }
        let job = &mut self.jobs[id as usize];
        job.attempts += 1;
        if arrival.class == ServiceClass::Offline {
            return self.lose(id, worker);
        }
        if job.attempts >= ATTEMPTS_MAX {
            job.ok = false;
            job.last_at = self.now;
            return self.end(id, worker);
        }
        self.place_again(id, DEATH_KNOWN);
    }

    /// Neither end of a move needs its pages any more.
    fn stop_moving(&mut self, id: JobId) {
        let job = &self.jobs[id as usize];
        let (from, to) = (job.worker as usize, job.to as usize);
        let tokens = self.workload.arrivals[id as usize].input + job.made;
        self.workers[from].batcher.release(id);
        self.workers[from].dirty = true;
        self.workers[to].inbound.retain(|waiting| *waiting != id);
        self.workers[to].batcher.release(id);
        self.workers[to].ledger(id).decode_over(tokens, self.now);
        self.left_arriving(to, tokens);
    }

    fn comes_up(&mut self, worker: usize) {
        let w = &mut self.workers[worker];
        w.up = true;
        w.dirty = true;
        self.view[worker].role = w.role;
        let incarnation = Incarnation(u64::from(w.life) + 1);
        if let Some(index) = &mut self.index {
            let taken = index.snapshot(&self.view[worker].worker, incarnation, 0, []);
            taken.expect("few workers have numbers");
        }
        if !self.options.stale.is_zero() && self.options.added.len() + self.options.workers > worker {
            self.at(self.now, Event::Report { worker: worker as u32 });
        }
    }

    pub(super) fn finish(mut self) -> Outcome {
        for worker in &self.workers {
            worker.batcher.check_books();
        }
        self.outcome.requests = report::online(self.workload);
        self.outcome.unfinished = self.outcome.requests - self.outcome.served.len();
        self.outcome.offline_open =
            self.offline_open.iter().map(Vec::len).sum::<usize>() + self.offline.len();
        self.outcome.kv_blocks_left = self.workers.iter().map(|w| u64::from(w.batcher.blocks().0)).sum();
        self.outcome.span = self.last_arrival();
        self.outcome.ended = self.now;
        self.outcome.log_hash = self.hash;
        self.outcome.busy_seconds = self.workers.iter().map(|w| w.busy_seconds).sum();
        self.outcome.prompt_tokens_in =
            self.workload.arrivals[..self.next].iter().map(|a| u64::from(a.input)).sum();
        self.outcome.batching = self.options.batching;
        self.outcome
    }
}
