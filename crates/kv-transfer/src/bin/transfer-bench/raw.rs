//! What the machine's own sockets do: one blocking connection between two processes, and no protocol beyond
//! "so many pieces of so many bytes".

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use tandem_memory::Region;

use crate::owner::{SOURCE_BYTES, filled, wait_for_the_end};

/// Serves one connection after the other until standard input ends.
pub fn serve() -> Result<(), String> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    let region = filled(false, SOURCE_BYTES)?;
    println!("{}", listener.local_addr().map_err(|error| error.to_string())?);
    tandem_chassis::seam::thread("raw", move || {
        while let Ok((stream, _)) = listener.accept() {
            let _ = answer(stream, &region);
        }
    });
    wait_for_the_end();
    Ok(())
}

fn answer(mut stream: TcpStream, region: &Region) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // SAFETY: nobody writes to it after it was filled.
    let bytes = unsafe { region.slice(0, SOURCE_BYTES) };
    loop {
        let [start, len, count] = read_words(&mut stream)?;
        let mut at = start as usize;
        for _ in 0..count {
            at = if at + len as usize > SOURCE_BYTES { 0 } else { at };
            stream.write_all(&bytes[at..at + len as usize])?;
            at += len as usize;
        }
    }
}

fn read_words(stream: &mut TcpStream) -> std::io::Result<[u64; 3]> {
    let mut words = [0; 24];
    stream.read_exact(&mut words)?;
    let word = |i: usize| u64::from_le_bytes(words[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
    Ok([word(0), word(1), word(2)])
}

/// The reading end.
pub struct Raw(TcpStream);

impl Raw {
    pub fn connect(address: &str) -> Result<Raw, String> {
        let stream = TcpStream::connect(address).map_err(|error| format!("{address}: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        Ok(Raw(stream))
    }

    /// Brings pieces of equal length from `start` on to these places.
    pub fn bring(&mut self, start: u64, len: u64, places: &[u64], local: &Region) -> Result<(), String> {
        let ask: Vec<u8> =
            [start, len, places.len() as u64].iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut bring = || {
            self.0.write_all(&ask)?;
            for &place in places {
                // SAFETY: one way is measured at a time, so nobody else writes here.
                self.0.read_exact(unsafe { local.slice_mut(place as usize, len as usize) })?;
            }
            std::io::Result::Ok(())
        };
        bring().map_err(|error| format!("the raw socket: {error}"))
    }
}
