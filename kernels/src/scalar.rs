//! The element types that weights, activations and KV are stored in. Arithmetic is always float32.

use tandem_device::Element;

/// A stored number.
pub(crate) trait Scalar: Copy + Send + Sync + 'static {
    /// Its name in the device interface.
    const ELEMENT: Element;
    /// Its value.
    fn load(self) -> f32;
    /// The nearest stored value, ties to even.
    fn store(value: f32) -> Self;
}

impl Scalar for f32 {
    const ELEMENT: Element = Element::F32;

    #[inline(always)]
    fn load(self) -> f32 {
        self
    }

    #[inline(always)]
    fn store(value: f32) -> f32 {
        value
    }
}

/// The upper half of a float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Bf16(pub(crate) u16);

impl Scalar for Bf16 {
    const ELEMENT: Element = Element::Bf16;

    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    // Without branches, so that loops over it vectorise.
    #[inline(always)]
    fn store(value: f32) -> Bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Bf16(if value.is_nan() { quiet as u16 } else { rounded as u16 })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bf16_rounds_like_the_half_crate(bits: u32) {
            let value = f32::from_bits(bits);
            let theirs = half::bf16::from_f32(value);
            prop_assert_eq!(Bf16::store(value).0, theirs.to_bits());
            if !value.is_nan() {
                prop_assert_eq!(Bf16::store(value).load(), theirs.to_f32());
            }
        }
    }
}
