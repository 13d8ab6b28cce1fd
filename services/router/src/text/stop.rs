//! Stop strings: text is held back while it could be the beginning of one.

/// Looks for the client's stop strings in one answer.
#[derive(Debug)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    include: bool,
    held: String,
}

impl StopStrings {
    /// `include`: the stop string itself belongs to the answer.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> StopStrings {
        StopStrings { stops, include, held: String::new() }
    }

    /// Takes text in. Returns what can be given out now, and the stop string if one is complete: then nothing
    /// after it belongs to the answer.
    pub(crate) fn push(&mut self, text: String) -> (String, Option<String>) {
        if self.stops.is_empty() {
            return (text, None);
        }
        self.held.push_str(&text);
        // The one that begins first; of those, the first listed.
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            let stop = stop.clone();
            let end = if self.include { at + stop.len() } else { at };
            let out = self.held[..end].to_owned();
            self.held.clear();
            return (out, Some(stop));
        }
        let keep = self.longest_beginning();
        let out = self.held[..self.held.len() - keep].to_owned();
        self.held.drain(..out.len());
        (out, None)
    }

    /// What was held back, when nothing more comes.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that begin a stop string.
    fn longest_beginning(&self) -> usize {
        let most = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0).min(self.held.len());
        let is_beginning = |&len: &usize| {
            let at = self.held.len() - len;
            self.held.is_char_boundary(at) && self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]))
        };
        (1..=most).rev().find(is_beginning).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[String]) -> (String, Option<String>) {
        let mut matcher = StopStrings::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut text = String::new();
        for piece in pieces {
            let (out, stop) = matcher.push(piece.clone());
            text.push_str(&out);
            if stop.is_some() {
                return (text, stop);
            }
        }
        text.push_str(&matcher.finish());
        (text, None)
    }

    fn pieces(text: &[&str]) -> Vec<String> {
        text.iter().map(|t| t.to_string()).collect()
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_never_shown() {
        assert_eq!(run(&["END"], false, &pieces(&["abE", "N", "Dxyz"])), ("ab".into(), Some("END".into())));
        assert_eq!(run(&["END"], true, &pieces(&["abE", "N", "Dxyz"])), ("abEND".into(), Some("END".into())));
        assert_eq!(run(&["END"], false, &pieces(&["abE", "N", "x"])), ("abENx".into(), None));
        assert_eq!(
            run(&["END"], false, &pieces(&["abEN"])),
            ("abEN".into(), None),
            "held text comes at the end"
        );
        assert_eq!(run(&["é!"], false, &pieces(&["caf", "é", "!"])), ("caf".into(), Some("é!".into())));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            text in "[ab]{0,30}",
            stops in prop::collection::vec("[ab]{1,4}", 0..4),
            cuts in prop::collection::vec(1..5usize, 0..30),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut split = Vec::new();
            let mut rest = text.as_str();
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                split.push(head.to_owned());
                rest = tail;
            }
            split.push(rest.to_owned());
            let (shown, stop) = run(&stops, false, &split);
            prop_assert!(text.starts_with(&shown));
            match stop {
                Some(stop) => prop_assert!(text[shown.len()..].starts_with(&stop)),
                None => prop_assert_eq!(&shown, &text),
            }
            let has_stop = stops.iter().any(|stop| text.contains(stop));
            prop_assert_eq!(has_stop, shown.len() < text.len() || stops.iter().any(|s| shown.contains(s)));
        }
    }
}
