//! The router of the simulated cluster: places prompts, moves KV, lets decodes in.

use super::*;

impl<'a> Cluster<'a> {
    pub(super) fn arrive(&mut self) {
        let id = self.next as JobId;
        self.next += 1;
        self.jobs.push(Job {
            stage: Stage::Waiting,
            worker: 0,
            to: 0,
            leg: 0,
            first_at: Time::ZERO,
            last_at: Time::ZERO,
            made: 0,
            attempts: 0,
            refused: 0,
            ok: true,
            missed: false,
        });
        let arrival = &self.workload.arrivals[id as usize];
        if arrival.class == ServiceClass::Offline {
            self.offline.push_back(id);
            return;
        }
        self.open_online += 1;
        self.log(1, u64::from(id), 0);
        let seconds = self.predicted.prefill(arrival.input, 0, FULL_CHUNK);
        let request = self.request(id);
        self.observer.arrived(&request, seconds, self.now);
        self.place(id);
    }

    /// What a policy may know of it.
    pub(super) fn request(&self, id: JobId) -> Request {
        let (job, arrival) = (&self.jobs[id as usize], &self.workload.arrivals[id as usize]);
        let online = arrival.class == ServiceClass::Online;
        let left = (arrival.at + self.options.first_token).remaining(self.now).as_secs_f64();
        Request {
            ordinal: self.ordinal,
            prompt_tokens: arrival.input + job.made,
            max_tokens: 1 << 20,
            expected_tokens: self.observer.output_tokens(),
            short_tokens: self.observer.short_tokens(),
            short_shares: self.observer.short_shares(),
            first_token_seconds: if !online {
                f64::INFINITY
            } else if job.made > 0 {
                self.options.first_token.as_secs_f64()
            } else {
                left
            },
            token_seconds: if online { self.options.per_token.as_secs_f64() } else { f64::INFINITY },
            class: arrival.class,
            held: Vec::new(),
        }
    }

    pub(super) fn blocks(&self, id: JobId) -> &'a [u32] {
        let (from, count) = self.workload.arrivals[id as usize].blocks;
        &self.workload.blocks[from as usize..(from + count) as usize]
    }

    pub(super) fn held(&self, id: JobId) -> Vec<Held> {
        let Some(index) = &self.index else { return Vec::new() };
        let hashes: Vec<BlockHash> = self.blocks(id).iter().map(|&block| cache::hash(block)).collect();
        let found = index.longest(&hashes).into_iter().map(|found| {
            let number = found.worker.0[2..].parse().expect("workers are numbered");
            Held {
                candidate: number,
                device_tokens: found.device_blocks * TRACE_BLOCK_TOKENS,
                tokens: found.blocks * TRACE_BLOCK_TOKENS,
                tier: found.tier,
            }
        });
        found.collect()
    }

    /// Finds workers for a request and sends it.
    pub(super) fn place(&mut self, id: JobId) {
        self.refresh(id as usize);
        let mut request = self.request(id);
        request.held = self.held(id);
        if let Some(retry_after) = self.refuses(id, &request) {
            return self.place_again(id, retry_after);
        }
        self.ordinal += 1;
        let Some(route) = self.policy.choose(&request, &self.view) else {
            return self.place_again(id, Duration::from_millis(100));
        };
        self.start_prefill(id, route.prefill, &request);
    }

    /// When a request that no worker has begun should come again, if it may not come in now.
    fn refuses(&mut self, id: JobId, request: &Request) -> Option<Duration> {
        let job = &mut self.jobs[id as usize];
        let refuses = self.options.admission && self.options.order == Order::Deadline;
        if !refuses || job.made > 0 || job.attempts > 0 {
            return None;
        }
        match admission::admit(request, &self.view, &Limits::default(), 0, usize::MAX) {
            Verdict::Admit { .. } => None,
            Verdict::Shed { retry_after, .. } => {
                let longer = 1 << job.refused;
                job.refused = (job.refused + 1).min(BACK_OFF_MAX);
                Some(retry_after * longer)
            }
        }
    }

    pub(super) fn start_prefill(&mut self, id: JobId, worker: usize, request: &Request) {
        self.log(2, u64::from(id), worker as u64);
        let held = request.held.iter().find(|held| held.candidate == worker);
        let cached = held.map_or(0, |held| held.tokens).min(request.prompt_tokens - 1);
        let budget = self.view[worker].prompt_budget;
        let seconds = self.model(worker).prefill(request.prompt_tokens - cached, cached, budget);
        let due = self.due(id);
        let job = &mut self.jobs[id as usize];
        (job.stage, job.worker) = (Stage::Prefill, worker as u32);
        let w = &mut self.workers[worker];
        if !w.up {
            // Sent to one that is dead and not yet known to be.
            return self.place_again(id, DEATH_KNOWN);
        }
        w.online += u32::from(request.class == ServiceClass::Online);
        let prompt =
            ledger::Prompt { tokens: request.prompt_tokens, cached, seconds, due, class: request.class };
        w.ledger(id).prompt_sent(id, prompt, self.now);
        let delay = self.bring(id, worker);
        if delay.is_zero() {
            self.take_prompt(id, worker);
        } else {
            let leg = self.jobs[id as usize].leg;
            self.at(self.now + delay, Event::Prompt { job: id, leg });
        }
    }

    /// It waits for so long and is placed then.
    pub(super) fn place_again(&mut self, id: JobId, delay: Duration) {
        let job = &mut self.jobs[id as usize];
        job.stage = Stage::Waiting;
        job.leg += 1;
        let leg = job.leg;
        self.at(self.now + delay, Event::Again { job: id, leg });
    }

    /// What the worker does to have the prefix: nothing, up from its host memory, or a pull from a peer.
    pub(super) fn bring(&mut self, id: JobId, worker: usize) -> Duration {
        if self.index.is_none() {
            return Duration::ZERO;
        }
        let blocks = self.blocks(id);
        let tokens = |count: u32| count * TRACE_BLOCK_TOKENS;
        let input = self.workload.arrivals[id as usize].input + self.jobs[id as usize].made;
        let (device, own) = self.workers[worker].cache.longest(blocks);
        let compute = |cached: u32| {
            let cached = tokens(cached).min(input - 1);
            self.model(worker).prefill(input - cached, cached, FULL_CHUNK)
        };
        let mut best = (compute(device), 0.0, device, None);
        let up = Tier::Host.link().seconds(f64::from(tokens(own - device)));
        if own > device && up + compute(own) < best.0 {
            best = (up + compute(own), up, own, None);
        }
        if self.options.peer_pulls {
            let peers = (0..self.workers.len()).filter(|&peer| peer != worker && self.workers[peer].up);
            let (longest, peer) = peers
                .map(|peer| (self.workers[peer].cache.longest(blocks).1, Reverse(peer)))
                .max()
                .unwrap_or((0, Reverse(0)));
            let seconds = self.view[worker].link.seconds(f64::from(tokens(longest.saturating_sub(device))));
            if longest > device && seconds + compute(longest) < best.0 {
                best = (seconds + compute(longest), seconds, longest, Some(peer.0));
            }
        }
        let (_, seconds, have, peer) = best;
        self.outcome.hit_tokens += u64::from(tokens(have).min(input - 1));
        self.outcome.pulled_tokens += if peer.is_some() { u64::from(tokens(have - device)) } else { 0 };
        if have > 0 {
            self.put(worker, &blocks[..have as usize]);
        }
        match peer {
            Some(peer) => self.transfer(peer, worker, tokens(have - device)).since(self.now),
            None => Duration::from_secs_f64(seconds),
        }
    }

    /// When so many tokens of KV, sent now, have arrived.
    pub(super) fn transfer(&mut self, from: usize, to: usize, tokens: u32) -> Time {
        let bytes = f64::from(tokens) * self.options.profile.kv_bytes as f64;
        let takes = Duration::from_secs_f64(bytes / self.options.link_bytes);
        let setup = Duration::from_millis(1);
        self.outcome.moved_tokens += u64::from(tokens);
        if !self.options.shared_links {
            return self.now + setup + takes;
        }
        // Transfers of one adapter take turns, each at full speed.
        let begin = (self.now + setup).max(self.workers[from].sends).max(self.workers[to].receives);
        let end = begin + takes;
        self.workers[from].sends = end;
        self.workers[to].receives = end;
        end
    }

    pub(super) fn put(&mut self, worker: usize, blocks: &[u32]) {
        let Some(index) = &mut self.index else { return };
        let w = &mut self.workers[worker];
        self.changes.clear();
        w.cache.put(blocks, &mut self.changes);
        for change in &self.changes {
            w.cache_sequence += 1;
            let (name, life) = (&self.view[worker].worker, u64::from(w.life) + 1);
            let taken = index.apply(name, Incarnation(life), w.cache_sequence, change);
            taken.expect("changes come in order");
        }
    }

    pub(super) fn take_prompt(&mut self, id: JobId, worker: usize) {
        let arrival = &self.workload.arrivals[id as usize];
        let job = &self.jobs[id as usize];
        let tokens = arrival.input + job.made;
        let cached = if self.index.is_some() {
            self.workers[worker].cache.longest(self.blocks(id)).0 * TRACE_BLOCK_TOKENS
        } else {
            0
        };
        let prompt = PromptJob {
            id,
            arrived: arrival.at,
            tokens,
            cached: cached.min(tokens - 1),
            due: self.due(id),
            class: arrival.class,
        };
        self.workers[worker].batcher.prompt(prompt);
        self.kick(worker);
    }

    /// When its first token is due. What had begun to stream when it was lost is never too late.
    fn due(&self, id: JobId) -> Time {
        let arrival = &self.workload.arrivals[id as usize];
        let has_target = arrival.class == ServiceClass::Online && self.jobs[id as usize].made == 0;
        if has_target { arrival.at + self.options.first_token } else { Time::MAX }
    }

    /// Brings the view up to date, as the router has it whose turn this is.
    pub(super) fn refresh(&mut self, turn: usize) {
        let exact = self.options.stale.is_zero();
        let by_deadline = self.options.order == Order::Deadline;
        for (worker, candidate) in self.workers.iter_mut().zip(&mut self.view) {
            if !exact {
                let router = turn % worker.ledgers.len();
                let by_deadline = candidate.model.filter(|_| by_deadline);
                show(candidate, &worker.ledgers[router].load(by_deadline, self.now));
            } else if worker.dirty {
                worker.dirty = false;
                let report = worker.report(self.now);
                show(candidate, &report.load);
                candidate.kv_usage = report.kv_usage;
                candidate.waiting = report.prompts;
            }
        }
    }

    pub(super) fn first_token(&mut self, id: JobId, worker: usize) {
        self.workers[worker].ledger(id).prompt_over(id, self.now);
        let arrival = &self.workload.arrivals[id as usize];
        let job = &mut self.jobs[id as usize];
        if job.made == 0 {
            job.first_at = self.now;
        }
        job.made += 1;
        job.last_at = self.now;
        let over = job.made >= arrival.output;
        self.log(3, u64::from(id), worker as u64);
        self.observer.drawn(1.0, f64::from(u8::from(over)), self.now);
        if self.index.is_some() {
            self.put(worker, self.blocks(id));
        }
        if over {
            self.workers[worker].batcher.release(id);
            return self.end(id, worker);
        }
        if arrival.class == ServiceClass::Offline {
            return self.decode_here(id, worker);
        }
        self.refresh(id as usize);
        let request = self.request(id);
        let Some(decode) = self.policy.choose_decode(&request, &self.view, Some(worker)) else {
            return self.decode_here(id, worker);
        };
        if (decode == worker && !self.options.as_reference) || !self.workers[decode].up {
            return self.decode_here(id, worker);
        }
        let tokens = arrival.input + self.jobs[id as usize].made;
        self.log(4, u64::from(id), decode as u64);
        let job = &mut self.jobs[id as usize];
        (job.stage, job.to) = (Stage::Moving, decode as u32);
        job.leg += 1;
        let w = &mut self.workers[decode];
        w.arriving.0 += 1;
        w.arriving.1 += u64::from(tokens);
        w.dirty = true;
        w.ledger(id).decode_sent(tokens, self.now);
        if self.options.as_reference && decode != worker {
            // The reference sends KV first and finds room for it then.
            return self.send_kv(id, decode);
        }
        self.workers[decode].inbound.push_back(id);
        self.let_in(decode);
    }

    pub(super) fn send_kv(&mut self, id: JobId, worker: usize) {
        let tokens = self.workload.arrivals[id as usize].input + self.jobs[id as usize].made - 1;
        let (from, leg) = (self.jobs[id as usize].worker, self.jobs[id as usize].leg);
        let arrives = self.transfer(from as usize, worker, tokens);
        self.at(arrives, Event::Kv { job: id, leg });
    }

    pub(super) fn decode_here(&mut self, id: JobId, worker: usize) {
        let tokens = self.workload.arrivals[id as usize].input + self.jobs[id as usize].made;
        self.workers[worker].ledger(id).decode_sent(tokens, self.now);
        self.join(id, worker);
    }

    pub(super) fn join(&mut self, id: JobId, worker: usize) {
        self.jobs[id as usize].stage = Stage::Decode;
        let job = self.decode_job(id);
        self.workers[worker].batcher.join(job);
        self.kick(worker);
    }

    pub(super) fn decode_job(&self, id: JobId) -> DecodeJob {
        let (job, arrival) = (&self.jobs[id as usize], &self.workload.arrivals[id as usize]);
        let online = arrival.class == ServiceClass::Online;
        DecodeJob {
            id,
            arrived: arrival.at,
            tokens: arrival.input + job.made,
            left: arrival.output - job.made,
            first_at: job.first_at,
            made: job.made - 1,
            token_seconds: if online { self.options.per_token.as_secs_f64() } else { f64::INFINITY },
            class: arrival.class,
        }
    }

    /// Room for decodes that wait for it, and their KV on its way.
    pub(super) fn let_in(&mut self, worker: usize) {
        while let Some(&id) = self.workers[worker].inbound.front() {
            let arrival = &self.workload.arrivals[id as usize];
            let tokens = arrival.input + self.jobs[id as usize].made;
            if !self.workers[worker].batcher.reserve(id, tokens) {
                if self.workers[worker].batcher.fits_ever(tokens) {
                    return;
                }
                // It never fits: it ends as it is.
                self.workers[worker].inbound.pop_front();
                self.left_arriving(worker, tokens);
                self.workers[worker].ledger(id).decode_over(tokens, self.now);
                let from = self.jobs[id as usize].worker as usize;
                self.workers[from].batcher.release(id);
                self.jobs[id as usize].ok = false;
                self.end(id, from);
                continue;
            }
            self.workers[worker].inbound.pop_front();
            if self.options.as_reference {
                self.left_arriving(worker, tokens);
                self.join(id, worker);
            } else {
                self.send_kv(id, worker);
            }
        }
    }

    pub(super) fn left_arriving(&mut self, worker: usize, tokens: u32) {
        let w = &mut self.workers[worker];
        w.arriving.0 -= 1;
        w.arriving.1 -= u64::from(tokens);
        w.dirty = true;
    }

    /// A request is over at this worker.
    pub(super) fn end(&mut self, id: JobId, worker: usize) {
        let arrival = &self.workload.arrivals[id as usize];
        let job = &mut self.jobs[id as usize];
        job.stage = Stage::Over;
        self.log(5, u64::from(id), worker as u64);
        let job = &self.jobs[id as usize];
        if arrival.class == ServiceClass::Offline {
            self.outcome.offline_requests += 1;
            self.offline_open[worker].retain(|open| *open != id);
            return;
        }
        self.workers[worker].online = self.workers[worker].online.saturating_sub(1);
        self.open_online -= 1;
        let first = job.first_at.since(arrival.at);
        let gaps = (arrival.output.saturating_sub(1)).max(1);
        let per_token = job.last_at.since(job.first_at) / gaps;
        let met = job.ok && first <= self.options.first_token && per_token <= self.options.per_token;
        self.met += usize::from(met);
        self.missed += usize::from(!met && !job.missed);
        self.sampled.0 += usize::from(met);
        self.sampled.1 += 1;
        let per_token = if arrival.output > 1 { per_token.as_secs_f32() } else { f32::NAN };
        self.outcome.served.push(Served { id, first: first.as_secs_f32(), per_token, met });
    }
}
