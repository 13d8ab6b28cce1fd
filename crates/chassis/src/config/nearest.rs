//! The right name for a wrong one.

/// The name among `names` that `word` most likely meant: the one that begins with it or that it begins with,
/// else the one fewest edits away. Dashes and underscores count as equal. `None` only without names.
pub fn nearest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    names.into_iter().min_by_key(|name| {
        let name = name.to_lowercase().replace('-', "_");
        let part = word.len() > 2 && (name.starts_with(&word) || word.starts_with(&name));
        let edits = edits(&word, &name);
        if part { edits.min(2) } else { edits * 2 }
    })
}

/// Insertions, deletions, replacements and swaps of neighbours from `a` to `b` (optimal string alignment).
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before_last = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before_last[j - 2] + 1);
            }
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_the_one_that_was_meant() {
        let names = ["port", "admin-port", "prefill", "decode", "kv-memory", "bind", "transport", "config"];
        for (word, right) in [
            ("prot", "port"),
            ("ports", "port"),
            ("kv_memory", "kv-memory"),
            ("kv-mem", "kv-memory"),
            ("bind-address", "bind"),
            ("prefil", "prefill"),
            ("admin_prot", "admin-port"),
            ("trans", "transport"),
        ] {
            assert_eq!(nearest(word, names), Some(right), "for {word}");
        }
        assert_eq!(nearest("port", []), None);
    }

    #[test]
    fn edits_are_counted() {
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("prot", "port"), 1);
    }
}
