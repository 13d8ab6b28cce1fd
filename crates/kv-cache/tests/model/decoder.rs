//! The workers that decode: what surrounds their pullers.

use std::sync::Arc;

use tandem_kv_cache::{GiveUp, PullAction, PullEvent, Puller};

use crate::bounds::*;
use crate::world::*;

impl State {
    pub fn hear(&mut self, at: usize) {
        let stream = Arc::make_mut(&mut self.streams[at]);
        let key = stream.key;
        for down in std::mem::take(&mut stream.down) {
            let event = match down {
                Down::Claimed(claim) => {
                    if let Some(leg) = self.leg(key) {
                        leg.claim = Some(claim);
                    }
                    PullEvent::Claimed(claim)
                }
                Down::Ready(first, words) => {
                    let count = words.len() as u32;
                    if let Some(leg) = self.leg(key) {
                        for (block, word) in (first as usize..).zip(words) {
                            leg.sums[block] = Some(word);
                        }
                    }
                    PullEvent::Ready { group: 0, first, count }
                }
                Down::Sealed(tokens, bundle) => PullEvent::Sealed { tokens, bundle },
                Down::Done => PullEvent::Done,
                Down::Superseded => PullEvent::Superseded,
                Down::Lost => PullEvent::Lost(String::new()),
                Down::Refused => PullEvent::StreamClosed(String::new()),
            };
            self.tell(key, event);
        }
    }

    pub fn leg(&mut self, key: Key) -> Option<&mut DecodeLeg> {
        let d = self.decoders.iter().position(|d| d.legs.iter().any(|leg| leg.key == key))?;
        Arc::make_mut(&mut self.decoders[d]).legs.iter_mut().find(|leg| leg.key == key)
    }

    pub fn decoder_reads(&mut self, bounds: &Bounds, d: usize, message: ToDecoder) {
        let fresh = |key, handle, puller| DecodeLeg {
            key,
            handle,
            puller,
            bytes: Default::default(),
            sums: Default::default(),
            asked: 0,
            claim: None,
        };
        match message {
            ToDecoder::Start(key, _, epoch) | ToDecoder::Borrow(key, epoch)
                if epoch != self.decoders[d].epoch =>
            {
                self.outcome(key, false);
            }
            ToDecoder::Start(key, handle, _) => {
                let leg = fresh(key, Some(handle), None);
                Arc::make_mut(&mut self.decoders[d]).legs.push(leg);
                self.follow(bounds, key, handle);
            }
            ToDecoder::Borrow(key, _) => {
                Arc::make_mut(&mut self.decoders[d]).legs.push(fresh(key, None, None));
                self.lends.push(Lend { key, copy: 0, awaited: true });
            }
            ToDecoder::Cancel(key) => self.leave_decoder(key, None),
            ToDecoder::SessionClosed => {
                let keys: Vec<Key> = self.decoders[d].legs.iter().map(|leg| leg.key).collect();
                keys.into_iter().for_each(|key| self.leave_decoder(key, None));
            }
        }
    }

    pub fn follow(&mut self, bounds: &Bounds, key: Key, handle: Handle) {
        let mut puller = Puller::new(1, handle.blocks, 0);
        if let Some(mistake) = bounds.mistake {
            puller.make(mistake);
        }
        self.leg(key).expect("it has just begun").puller = Some(puller);
        self.streams.push(Arc::new(Stream {
            key,
            copy: 0,
            handle,
            claiming: true,
            claim: None,
            down: Vec::new(),
            followed: true,
            served: true,
            broken: false,
        }));
    }

    /// Tells a puller something, if it is still there, and does what it wants.
    pub fn tell(&mut self, key: Key, event: PullEvent) {
        let Some(leg) = self.leg(key) else { return };
        let Some(puller) = leg.puller.as_mut() else { return };
        puller.on(event);
        while let Some(action) = self.leg(key).and_then(|leg| leg.puller.as_mut()?.next_action()) {
            let leg = self.leg(key).expect("looked up above");
            let handle = leg.handle.expect("it follows");
            match action {
                PullAction::Pull { id, claim, blocks } => {
                    let pages = handle.pages[blocks.start as usize..blocks.end as usize].to_vec();
                    self.reads.push(Read { key, id, claim, blocks, pages, reading: Reading::Asked });
                }
                PullAction::AskVerdict(claim) => {
                    leg.asked = 1;
                    self.ends.push(End { key, handle, claim, complete: true, awaited: true });
                }
                PullAction::Deliver { .. } => self.deliver(key),
                PullAction::GiveUp(why) => {
                    let claim = leg.claim;
                    self.leave_decoder(key, Some(false));
                    if let (GiveUp::Corrupt(_), Some(claim)) = (why, claim) {
                        self.ends.push(End { key, handle, claim, complete: false, awaited: false });
                    }
                }
            }
        }
    }

    /// The bytes are used from now on.
    pub fn deliver(&mut self, key: Key) {
        let leg = self.leg(key).expect("it delivers");
        let blocks = leg.handle.expect("it followed").blocks as usize;
        let whole = (0..blocks).all(|block| {
            let word = leg.sums[block];
            word.is_some() && leg.bytes[block].iter().all(|half| Some(*half) == word)
        });
        let contents: Vec<u8> = leg.bytes[..blocks].iter().map(|bytes| bytes[0].content).collect();
        if !whole || contents != self.contents(key, blocks) {
            self.wrong = Some(Wrong::BytesUsed);
        }
        self.leave_decoder(key, Some(true));
    }

    pub fn contents(&self, key: Key, blocks: usize) -> Vec<u8> {
        // A borrowed prefix is one block, the first request's first.
        let request = if blocks == 1 { 0 } else { key.request };
        (0..blocks as u8).map(|block| 1 + 2 * request + block).collect()
    }

    /// An attempt leaves a decoder: its stream closes, its reads and questions go on without it.
    pub fn leave_decoder(&mut self, key: Key, well: Option<bool>) {
        let Some(d) = self.decoders.iter().position(|d| d.legs.iter().any(|leg| leg.key == key)) else {
            return;
        };
        Arc::make_mut(&mut self.decoders[d]).legs.retain(|leg| leg.key != key);
        for stream in self.streams.iter_mut().filter(|stream| stream.key == key && stream.followed) {
            let stream = Arc::make_mut(stream);
            stream.followed = false;
            stream.down.clear();
        }
        self.ends.iter_mut().filter(|end| end.key == key).for_each(|end| end.awaited = false);
        self.lends.iter_mut().filter(|lend| lend.key == key).for_each(|lend| lend.awaited = false);
        self.lent.retain(|(of, _)| *of != key);
        if let Some(well) = well {
            self.outcome(key, well);
        }
    }

    pub fn lent(&mut self, bounds: &Bounds, key: Key, handle: Option<Handle>) {
        let Some(leg) = self.leg(key) else { return };
        match handle {
            Some(handle) => {
                leg.handle = Some(handle);
                self.follow(bounds, key, handle);
            }
            // Computing is always possible.
            None => self.leave_decoder(key, Some(true)),
        }
    }

    pub fn end_read(&mut self, bounds: &Bounds, at: usize, flipped: bool) {
        let read = self.reads.remove(at);
        let Reading::Halfway { hold, first } = read.reading else { unreachable!("it has begun") };
        let second = read.pages.iter().map(|&page| self.owner.memory[page as usize][1]);
        let mut bytes: Vec<Bytes> =
            first.into_iter().zip(second).map(|(first, second)| [first, second]).collect();
        if let Some(hold) = hold {
            if bytes.iter().any(|[first, second]| first != second) && !self.given_back_twice {
                self.wrong = Some(Wrong::BytesSeen);
            }
            self.kv(|kv| kv.release(hold.0));
        }
        if flipped {
            bytes[0][1].content = u8::MAX;
        }
        let Some(leg) = self.leg(read.key) else { return };
        let blocks = read.blocks.start as usize..read.blocks.end as usize;
        let sums = &leg.sums[blocks.clone()];
        let known = sums.iter().all(Option::is_some);
        let equal = sums.iter().zip(&bytes).all(|(sum, bytes)| bytes.iter().all(|half| Some(*half) == *sum));
        leg.bytes[blocks].copy_from_slice(&bytes);
        let event = match (bounds.checksums && known, equal) {
            (true, true) => PullEvent::Verified(read.id),
            (true, false) => PullEvent::Corrupt(read.id),
            (false, _) => PullEvent::Arrived(read.id),
        };
        self.tell(read.key, event);
    }

    /// The answer did not come: asks once more, then does without.
    pub fn ask_again(&mut self, key: Key) {
        let Some(leg) = self.leg(key) else { return };
        if leg.asked >= 2 {
            return self.tell(key, PullEvent::NoVerdict(String::new()));
        }
        leg.asked += 1;
        let (handle, claim) = (leg.handle.expect("it asked"), leg.claim.expect("it asked"));
        self.ends.push(End { key, handle, claim, complete: true, awaited: true });
    }
}
