//! The few cheapest of many.

/// Indices of the few smallest costs, in order of cost, equals by index.
pub(super) fn smallest(few: usize, costs: impl Iterator<Item = f64>) -> Vec<usize> {
    let mut best: Vec<(f64, usize)> = Vec::with_capacity(few + 1);
    for (at, cost) in costs.enumerate() {
        if best.len() == few && cost.total_cmp(&best[few - 1].0).is_ge() {
            continue;
        }
        let place = best.partition_point(|(other, _)| other.total_cmp(&cost).is_le());
        best.insert(place, (cost, at));
        best.truncate(few);
    }
    best.into_iter().map(|(_, at)| at).collect()
}

/// [`smallest`] of costs that are at least so much; `cost` is asked for those that may be among them.
pub(super) fn smallest_above(few: usize, least: &[f64], mut cost: impl FnMut(usize) -> f64) -> Vec<usize> {
    let mut best: Vec<(f64, usize)> = Vec::with_capacity(few + 1);
    let mut look = |at: usize, best: &mut Vec<(f64, usize)>| {
        let new = (cost(at), at);
        let place = best.partition_point(|other| (other.0.total_cmp(&new.0)).then(other.1.cmp(&at)).is_lt());
        best.insert(place, new);
        best.truncate(few);
    };
    // Those that are likely to be the best first, so that the others need not be asked for.
    let first = smallest(few, least.iter().copied());
    for &at in &first {
        look(at, &mut best);
    }
    for (at, least) in least.iter().enumerate() {
        let comes_later = |last: &(f64, usize)| *least > last.0 || (*least == last.0 && at > last.1);
        let out = best.len() == few && best.last().is_some_and(comes_later);
        if !out && !first.contains(&at) {
            look(at, &mut best);
        }
    }
    best.into_iter().map(|(_, at)| at).collect()
}

/// One of those whose cost is the least by and large; `turn` says which.
pub(super) fn in_turn<T: Copy + Ord>(
    costs: Vec<(T, f64)>,
    equal_seconds: f64,
    turn: u64,
) -> Option<(T, f64)> {
    let least = costs.iter().map(|(_, cost)| *cost).min_by(f64::total_cmp)?;
    let near = |cost: f64| cost <= least + equal_seconds || cost.total_cmp(&least).is_eq();
    let mut equal: Vec<(T, f64)> = costs.into_iter().filter(|(_, cost)| near(*cost)).collect();
    equal.sort_by_key(|(which, _)| *which);
    equal.dedup_by_key(|(which, _)| *which);
    Some(equal[(turn % equal.len() as u64) as usize])
}
