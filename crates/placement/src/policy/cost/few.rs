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
