//! The highest scale that a cluster sustains.

/// The highest scale that `holds`, to this precision (0.01 is 1 %). `guess` is where to look first.
///
/// Attainment falls with load but for noise; the result is a scale that was tried and held.
pub fn highest_scale(mut holds: impl FnMut(f64) -> bool, precision: f64, guess: f64) -> f64 {
    let (mut low, mut high) = (0.0, f64::INFINITY);
    let (mut at, mut step) = (guess.max(1e-3), 1.15f64);
    while low == 0.0 || high.is_infinite() {
        if holds(at) {
            low = at;
            at *= step;
        } else {
            high = at;
            at /= step;
        }
        if at < 1e-3 {
            return 0.0;
        }
        if at > 1e5 {
            return low;
        }
        step *= 1.1;
    }
    while high / low > 1.0 + precision {
        let middle = (low * high).sqrt();
        if holds(middle) { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_edge_is_found_from_any_guess() {
        for guess in [0.01, 1.0, 7.3, 7.4, 500.0] {
            let found = highest_scale(|scale| scale <= 7.35, 0.01, guess);
            assert!((7.27..=7.35).contains(&found), "{guess}: {found}");
        }
        assert_eq!(highest_scale(|_| false, 0.01, 1.0), 0.0);
    }
}
