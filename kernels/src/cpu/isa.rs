//! Which instruction set the kernels run on. One source is compiled for each; the arithmetic is the same, but for
//! products of bf16, which have a form of their own on each ([`super::form`]).

use tandem_device::Error;

/// The instruction sets kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every machine of the architecture has.
    Portable,
    /// 256-bit vectors, products fused with additions.
    Avx2,
    /// 512-bit vectors, products fused with additions, and products of four bytes. Machines with AVX-512 but without
    /// those use `Avx2`.
    Avx512Fma,
    /// The same with products of bf16 pairs.
    Avx512,
}

impl Isa {
    /// All, from the plainest.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512Fma, Isa::Avx512];

    /// The word used in `TANDEM_CPU`.
    pub fn as_str(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512Fma => "avx512-fma",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    #[cfg(target_arch = "x86_64")]
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Isa::Avx512Fma => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Isa::Avx512 => Isa::Avx512Fma.available() && is_x86_feature_detected!("avx512bf16"),
        }
    }

    /// Whether this machine has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn available(self) -> bool {
        self == Isa::Portable
    }

    /// Whether bytes are multiplied as they are.
    pub(super) fn multiplies_bytes(self) -> bool {
        self >= Isa::Avx512Fma
    }

    /// Whether this machine's products of bf16 pairs are slower than fused products of what they are made of. Made sure
    /// of by measuring on Intel's Golden Cove; not measured at run time, for workers of one kind must choose alike.
    #[cfg(target_arch = "x86_64")]
    fn pairs_are_slow() -> bool {
        let vendor = std::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
    }

    /// Whether this machine's products of bf16 pairs are slower than fused products of what they are made of.
    #[cfg(not(target_arch = "x86_64"))]
    fn pairs_are_slow() -> bool {
        false
    }

    /// The one named by force, else the fastest that this machine has.
    pub fn choose(forced: Option<&str>) -> Result<Isa, Error> {
        let Some(name) = forced else {
            let best = Isa::ALL.into_iter().rev().find(|isa| isa.available());
            return Ok(match best.unwrap_or(Isa::Portable) {
                Isa::Avx512 if Isa::pairs_are_slow() => Isa::Avx512Fma,
                best => best,
            });
        };
        let isa = Isa::ALL.into_iter().find(|isa| isa.as_str() == name).ok_or_else(|| {
            let names = Isa::ALL.map(Isa::as_str).join(", ");
            Error::Unsupported(format!("TANDEM_CPU={name} is unknown; expected one of {names}"))
        })?;
        match isa.available() {
            true => Ok(isa),
            false => Err(Error::Unsupported(format!("TANDEM_CPU={name}: this machine does not have it"))),
        }
    }
}

/// Compiles `body`, an `inline(always)` function of (job, part, parts), once per instruction set, and makes a
/// function of (isa, job, part, parts) that calls the one for `isa`.
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $body:ident, $job:ident $(<$scalar:ident: $bound:ident>)?) => {
        $(#[$doc])*
        pub(super) fn $name $(<$scalar: $bound>)? (
            isa: super::Isa, job: &$job $(<$scalar>)?, part: usize, parts: usize,
        ) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$scalar: $bound>)? (job: &$job $(<$scalar>)?, part: usize, parts: usize) {
                    $body(job, part, parts)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
                fn avx512 $(<$scalar: $bound>)? (job: &$job $(<$scalar>)?, part: usize, parts: usize) {
                    $body(job, part, parts)
                }
                match isa {
                    super::Isa::Portable => {}
                    // SAFETY: an `Isa` in use was found available when the device was opened.
                    super::Isa::Avx2 => return unsafe { avx2(job, part, parts) },
                    // SAFETY: as above.
                    super::Isa::Avx512Fma | super::Isa::Avx512 => return unsafe { avx512(job, part, parts) },
                }
            }
            let _ = isa;
            $body(job, part, parts)
        }
    };
}

pub(super) use kernel;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_instruction_set_is_taken_or_refused_and_never_replaced() {
        assert_eq!(Isa::choose(Some("portable")).unwrap(), Isa::Portable);
        for isa in Isa::ALL {
            match Isa::choose(Some(isa.as_str())) {
                Ok(chosen) => assert_eq!(chosen, isa),
                Err(error) => assert!(!isa.available() && error.to_string().contains(isa.as_str())),
            }
        }
        let message = Isa::choose(Some("sse9")).unwrap_err().to_string();
        assert_eq!(message, "TANDEM_CPU=sse9 is unknown; expected one of portable, avx2, avx512-fma, avx512");
    }

    #[test]
    fn without_force_the_widest_that_is_there_is_taken() {
        let chosen = Isa::choose(None).unwrap();
        assert!(chosen.available());
        let wider = |isa: &Isa| *isa > chosen && isa.available();
        match Isa::ALL.into_iter().find(wider) {
            None => {}
            Some(wider) => assert_eq!((chosen, wider), (Isa::Avx512Fma, Isa::Avx512)),
        }
    }
}
