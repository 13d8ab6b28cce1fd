//! The router: places requests, follows what becomes of them, and ends what they have.

use std::sync::Arc;

use crate::action::Who;
use crate::bounds::*;
use crate::world::*;

impl State {
    pub fn place(&mut self, bounds: &Bounds, r: u8) {
        let request = &mut self.requests[r as usize];
        request.attempt += 1;
        let key = Key { request: r, attempt: request.attempt };
        if bounds.second == Second::Borrow && r == 1 {
            request.decode = Some(Decode { attempt: key.attempt, decoder: Some(1) });
            self.to_decoder[1].push(ToDecoder::Borrow(key, self.decoders[1].epoch));
            return;
        }
        request.prefill = Some(key.attempt);
        request.handle = None;
        request.first_token = false;
        self.to_owner.push(ToOwner::Start(key, self.owner.epoch));
    }

    pub fn decode(&mut self, r: u8, decoder: Option<usize>) {
        let request = &mut self.requests[r as usize];
        request.attempt += 1;
        let key = Key { request: r, attempt: request.attempt };
        let handle = request.handle.expect("granted");
        request.decode = Some(Decode { attempt: key.attempt, decoder });
        match decoder {
            Some(d) => {
                self.to_decoder[d].push(ToDecoder::Start(key, handle, self.decoders[d].epoch));
            }
            None => self.to_owner.push(ToOwner::Adopt(key, handle.lease, self.owner.epoch)),
        }
    }

    /// Drops whatever the request has, and that cancels it everywhere.
    pub fn end_request(&mut self, r: u8, ended: Ended) {
        self.drop_decode(r);
        let request = &mut self.requests[r as usize];
        if let Some(attempt) = request.prefill {
            self.to_owner.push(ToOwner::Cancel(Key { request: r, attempt }));
        }
        *request = Request { ended: Some(ended), attempt: u8::MAX, ..Request::default() };
    }

    pub fn drop_decode(&mut self, r: u8) {
        let Some(Decode { attempt, decoder }) = self.requests[r as usize].decode else { return };
        let key = Key { request: r, attempt };
        match decoder {
            Some(d) => self.to_decoder[d].push(ToDecoder::Cancel(key)),
            None => self.to_owner.push(ToOwner::Cancel(key)),
        }
    }

    /// The decode attempt has sent its first token, or will not.
    pub fn outcome(&mut self, key: Key, well: bool) {
        let request = &mut self.requests[key.request as usize];
        if request.decode.is_none_or(|decode| decode.attempt != key.attempt) {
            return;
        }
        if well {
            // The leg goes on, and what it does then is not looked at here.
            request.decode = None;
            self.end_request(key.request, Ended::HandedOff);
        } else {
            request.decode = None;
        }
    }

    /// The prefill attempt is over at the owner.
    pub fn released(&mut self, key: Key) {
        let Some(request) = self.requests.get_mut(key.request as usize) else { return };
        if request.prefill == Some(key.attempt) {
            (request.prefill, request.handle, request.first_token) = (None, None, false);
        }
    }

    pub fn lose_owner_session(&mut self) {
        self.to_owner.clear();
        self.to_owner.push(ToOwner::SessionClosed);
        for request in &mut self.requests {
            (request.prefill, request.handle, request.first_token) = (None, None, false);
            if request.decode.is_some_and(|decode| decode.decoder.is_none()) {
                request.decode = None;
            }
        }
    }

    pub fn lose_decoder_session(&mut self, d: usize) {
        self.to_decoder[d].clear();
        self.to_decoder[d].push(ToDecoder::SessionClosed);
        for request in &mut self.requests {
            if request.decode.is_some_and(|decode| decode.decoder == Some(d)) {
                request.decode = None;
            }
        }
    }

    pub fn crash(&mut self, bounds: &Bounds, who: Who) {
        match who {
            Who::Router => {
                self.router = false;
                for r in 0..2 {
                    let request = &mut self.requests[r];
                    request.ended.get_or_insert(Ended::Gone);
                    *request = Request { ended: request.ended, attempt: u8::MAX, ..Request::default() };
                }
                self.lose_owner_session();
                (0..2).for_each(|d| self.lose_decoder_session(d));
            }
            Who::Owner => {
                let incarnation = self.owner.incarnation + 1;
                self.owner = Arc::new(Owner::new(bounds, incarnation));
                self.lose_owner_session();
                self.to_owner.clear();
                self.told.clear();
                for stream in &mut self.streams {
                    let stream = Arc::make_mut(stream);
                    (stream.claim, stream.served, stream.broken, stream.claiming) =
                        (None, false, true, false);
                    stream.down.clear();
                }
                self.reads.iter_mut().for_each(|read| read.reading = Reading::Failed);
            }
            Who::Decoder(d) => {
                self.lose_decoder_session(d);
                self.to_decoder[d].clear();
                let keys: Vec<Key> = self.decoders[d].legs.iter().map(|leg| leg.key).collect();
                keys.into_iter().for_each(|key| self.leave_decoder(key, None));
            }
        }
    }
}
