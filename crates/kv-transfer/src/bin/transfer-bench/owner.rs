//! The other end of a transport, as a process.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use tandem_kv_transfer::{ByteRange, Denied, Exported, Gate, Options, Permit, Row, allowed};
use tandem_memory::Region;
use tandem_types::{ClaimId, Export, Incarnation};

/// What every owner has: far more than any cache holds.
pub const SOURCE_BYTES: usize = 512 << 20;

struct Open;

impl Gate for Open {
    fn begin(&self, _: ClaimId, _: &[ByteRange]) -> Result<Permit, Denied> {
        Ok(Box::new(()))
    }
}

/// Memory that was written to, so that every page of it is there.
pub fn filled(shared: bool, bytes: usize) -> Result<Arc<Region>, String> {
    let region = if shared { Region::shared(bytes) } else { Region::anonymous(bytes) };
    let region = region.map_err(|error| format!("{bytes} bytes of memory: {error}"))?;
    // SAFETY: nobody else knows this region yet.
    let words = unsafe { region.slice_mut(0, bytes) }.chunks_exact_mut(8).enumerate();
    words.for_each(|(i, word)| word.copy_from_slice(&(i as u64).wrapping_mul(0x9E37_79B1).to_le_bytes()));
    Ok(Arc::new(region))
}

/// An export of new memory.
pub async fn export(row: &Row) -> Result<Exported, String> {
    let region = filled(row.shared_memory, SOURCE_BYTES)?;
    let bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let exported = (row.make)(&Options::default()).export(region, Arc::new(Open), Incarnation(1), bind).await;
    exported.map_err(|error| error.to_string())
}

/// Serves until standard input ends.
pub fn serve(transport: &str) -> Result<(), String> {
    let row = allowed(transport).next().ok_or_else(|| format!("there is no transport {transport}"))?;
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
    let exported = runtime.block_on(export(row))?;
    let hex: String = exported.export().blob.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{hex}");
    wait_for_the_end();
    Ok(())
}

/// Returns when whoever has started this process is done with it, or gone.
pub fn wait_for_the_end() {
    let _ = std::io::stdin().read(&mut [0]);
}

/// An owner in a process of its own; it goes with this value.
pub struct Started {
    child: Child,
    /// What it has said.
    pub line: String,
}

impl Started {
    pub fn new(command: &mut Command) -> Result<Started, String> {
        let name = format!("{:?}", command.get_program());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{name}: {error}"))?;
        let mut line = String::new();
        let mut said = child.stdout.take().expect("it was asked for");
        let mut byte = [0];
        while said.read(&mut byte).is_ok_and(|count| count == 1) && byte[0] != b'\n' {
            line.push(byte[0] as char);
        }
        Ok(Started { child, line })
    }

    /// This program in another part.
    pub fn this(part: &str) -> Result<Started, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        Started::new(Command::new(program).args(["owner", part]))
    }

    /// What it exports.
    pub fn export(&self, transport: &str) -> Result<Export, String> {
        let digits = |at: usize| self.line.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        let blob: Option<Vec<u8>> = (0..self.line.len()).step_by(2).map(digits).collect();
        let blob = blob.filter(|blob| !blob.is_empty());
        let blob = blob.ok_or_else(|| format!("the owner for {transport} did not start"))?;
        Ok(Export { transport: transport.to_owned(), blob })
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
