//! placeholder
use tandem_batching::pace::Pace;
use tandem_types::Time;

use crate::twin::{DecodeJob, Happened, JobId, PromptJob, Shape, Twin};

/// placeholder
pub struct Real(Twin);

#[allow(missing_docs)]
impl Real {
    pub fn new(pace: Pace, kv: u64) -> Real { Real(Twin::new(pace, kv)) }
    pub fn set_pace(&mut self, pace: Pace) { self.0.set_pace(pace) }
    pub fn prompt(&mut self, job: PromptJob) { self.0.prompt(job) }
    pub fn reserve(&mut self, id: JobId, tokens: u32) -> bool { self.0.reserve(id, tokens) }
    pub fn fits_ever(&self, tokens: u32) -> bool { self.0.fits_ever(tokens) }
    pub fn release(&mut self, id: JobId) { self.0.release(id) }
    pub fn join(&mut self, job: DecodeJob) { self.0.join(job) }
    pub fn plan(&mut self, now: Time) -> Option<Shape> { self.0.plan(now) }
    pub fn apply(&mut self, h: &mut Vec<Happened>, _: Time) { self.0.apply(h) }
    pub fn take_preempted(&mut self) -> Vec<JobId> { self.0.take_preempted() }
    pub fn clear(&mut self) -> Vec<JobId> { self.0.clear() }
    pub fn decodes(&self) -> (u32, u64) { self.0.decodes() }
    pub fn prompts(&self) -> usize { self.0.prompts() }
    pub fn queue_seconds(&self) -> (f64, f64) { self.0.queue_seconds() }
    pub fn blocks(&self) -> (u32, u32) { self.0.blocks() }
    pub fn check_books(&self) { self.0.check_books() }
}
