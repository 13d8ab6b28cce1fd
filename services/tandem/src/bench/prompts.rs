//! Prompts of a wanted number of tokens, by the tokenizer of whoever is asked.
//!
//! Common words, each behind a space, are tokens of their own in nearly every vocabulary, and their counts add up.
//! Which of them cost how much is asked once, before the run: from `/tokenize`, or from the usage of small requests
//! where that is missing. Each prompt begins with a number that no other prompt has, so that no two share a prefix
//! unless they are to.

use std::fmt::Write;
use std::future::Future;

use tandem_simulator::random;

/// Counts the tokens of a prompt as the server would, template and all.
pub trait Counts {
    /// The number; none where the server does not say; or why it could not be asked.
    fn count(&mut self, text: &str) -> impl Future<Output = Result<Option<u32>, String>>;
}

const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "the",
    "of",
];

/// Digits of the number that a prompt begins with.
const DIGITS: u32 = 8;
const NUMBERS: u64 = 10u64.pow(DIGITS);
/// Visits every number below [`NUMBERS`] before any again, and neighbours look nothing alike.
const STRIDE: u64 = 61_803_399;

/// Tokens of a prefix block of a trace.
const BLOCK_TOKENS: u32 = tandem_simulator::workload::TRACE_BLOCK_TOKENS;

/// What the server's tokenizer makes of our words.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Tokens of a prompt of one number, with whatever the server puts around it.
    first: u32,
    /// Tokens of each digit of it.
    digit: f64,
    /// Tokens of a number within a prompt.
    later: u32,
    /// Tokens of each word.
    words: Vec<u32>,
    /// The words of one token.
    single: Vec<usize>,
}

impl Costs {
    /// A token for every word and every digit.
    pub fn guessed() -> Costs {
        let words = WORDS.len();
        Costs {
            first: DIGITS,
            digit: 1.0,
            later: DIGITS,
            words: vec![1; words],
            single: (0..words).collect(),
        }
    }

    /// Asks for the cost of every word: all at once, and half by half where the sum is not one token each. None
    /// where the server does not count.
    pub async fn measure(counts: &mut impl Counts) -> Result<Option<Costs>, String> {
        let mut numbers = Vec::new();
        for sample in 0..4 {
            let Some(count) = counts.count(&number(sample * 7 + 1, DIGITS)).await? else { return Ok(None) };
            numbers.push(count);
        }
        let first = (f64::from(numbers.iter().sum::<u32>()) / numbers.len() as f64).round() as u32;
        let Some(short) = counts.count(&number(1, DIGITS / 2)).await? else { return Ok(None) };
        let base = number(1, DIGITS);
        let before = numbers[0];
        let Some(two) = counts.count(&format!("{base} {}", number(2, DIGITS))).await? else {
            return Ok(None);
        };
        let mut words = vec![0; WORDS.len()];
        let mut open = vec![(0, WORDS.len())];
        while let Some((from, to)) = open.pop() {
            let range = from..to;
            let text = format!("{base} {}", WORDS[range.clone()].join(" "));
            let Some(count) = counts.count(&text).await? else { return Ok(None) };
            let cost = count.saturating_sub(before);
            // No word costs nothing, so a sum of one each means one each.
            if range.len() == 1 {
                words[from] = cost.max(1);
            } else if cost as usize == range.len() {
                words[range].fill(1);
            } else {
                let middle = from + range.len() / 2;
                open.extend([(from, middle), (middle, to)]);
            }
        }
        let single = (0..WORDS.len()).filter(|&word| words[word] == 1).collect();
        let digit = f64::from(before.saturating_sub(short)) / f64::from(DIGITS - DIGITS / 2);
        Ok(Some(Costs { first, digit, later: two.saturating_sub(before), words, single }))
    }
}

/// A part of a prompt: which, and how many tokens of it.
struct Part {
    name: u64,
    tokens: u32,
}

/// Writes prompts.
#[derive(Clone, Debug)]
pub struct Prompts {
    costs: Costs,
    seed: u64,
    /// Prompts have one of so many common beginnings of so many tokens.
    shared: Option<(u64, u32)>,
}

/// Keep the numbers of common beginnings and of blocks apart from those of requests.
const SHARED: u64 = 1 << 60;
const BLOCKS: u64 = 1 << 61;

impl Prompts {
    /// `shared` is a number of groups and how many tokens the prompts of a group begin with alike.
    pub fn new(costs: Costs, seed: u64, shared: Option<(u64, u32)>) -> Prompts {
        Prompts { costs, seed, shared }
    }

    /// Tokens that every prompt has in front of its own.
    pub fn shared_tokens(&self) -> u32 {
        self.shared.map_or(0, |(_, tokens)| tokens)
    }

    /// The prompt of a request: `tokens` of its own, behind what it shares with others.
    pub fn text(&self, request: u64, tokens: u32, blocks: &[u32]) -> String {
        let mut parts = Vec::new();
        let mut own = tokens;
        if let Some((groups, shared)) = self.shared {
            let group = (random::uniform(self.seed, SHARED, request) * groups as f64) as u64;
            parts.push(Part { name: SHARED + group, tokens: shared });
        }
        for &block in blocks {
            let tokens = own.min(BLOCK_TOKENS);
            own -= tokens;
            if tokens > 0 {
                parts.push(Part { name: BLOCKS + u64::from(block), tokens });
            }
        }
        if own > 0 || parts.is_empty() {
            parts.push(Part { name: request, tokens: own });
        }
        let mut text = String::with_capacity(6 * tokens as usize + 64);
        for part in parts {
            self.write(&mut text, &part);
        }
        text
    }

    fn write(&self, text: &mut String, part: &Part) {
        let number_of = (part.name % SHARED).wrapping_mul(STRIDE) + self.seed % NUMBERS + part.name / SHARED;
        let mut left = part.tokens;
        if text.is_empty() {
            // Where a prompt is shorter than its number, the number has fewer digits.
            let above = self.costs.first.saturating_sub(left);
            let digits =
                DIGITS - ((f64::from(above) / self.costs.digit.max(0.01)).ceil() as u32).min(DIGITS - 1);
            text.push_str(&digits_of(number_of, digits));
            left = left.saturating_sub(self.costs.first);
        } else {
            let _ = write!(text, " {}", digits_of(number_of, DIGITS));
            left = left.saturating_sub(self.costs.later);
        }
        let mut draw = 0;
        while left > 0 {
            let at = random::uniform(self.seed, part.name, draw);
            draw += 1;
            let mut word = (at * WORDS.len() as f64) as usize;
            if self.costs.words[word] > left {
                let Some(&single) = self.costs.single.get((at * self.costs.single.len() as f64) as usize)
                else {
                    return;
                };
                word = single;
            }
            text.push(' ');
            text.push_str(WORDS[word]);
            left -= self.costs.words[word];
        }
    }
}

fn number(of: u64, digits: u32) -> String {
    digits_of(of.wrapping_mul(STRIDE), digits)
}

/// The last `digits` of the number below [`NUMBERS`] that stands for this one.
fn digits_of(of: u64, digits: u32) -> String {
    let width = digits as usize;
    format!("{:0width$}", of % NUMBERS % 10u64.pow(digits))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// A tokenizer: digits one by one, or in threes; words of more than `long` letters are two tokens; a template of
    /// three tokens around everything.
    struct Invented {
        long: usize,
        digits: u32,
        asked: u32,
    }

    impl Invented {
        fn tokens(&self, text: &str) -> u32 {
            let cost = |word: &str| match word.as_bytes()[0].is_ascii_digit() {
                true => (word.len() as u32).div_ceil(self.digits),
                false => 1 + u32::from(word.len() > self.long),
            };
            3 + text.split(' ').map(cost).sum::<u32>()
        }
    }

    impl Counts for Invented {
        async fn count(&mut self, text: &str) -> Result<Option<u32>, String> {
            self.asked += 1;
            Ok(Some(self.tokens(text)))
        }
    }

    async fn measured(mut invented: Invented) -> (Invented, Costs) {
        let costs = Costs::measure(&mut invented).await.expect("it answers").expect("it counts");
        (invented, costs)
    }

    #[tokio::test]
    async fn prompts_have_exactly_the_tokens_asked_for() {
        for (long, digits) in [(99, 1), (4, 1), (99, 3), (3, 8)] {
            let (invented, costs) = measured(Invented { long, digits, asked: 0 }).await;
            let prompts = Prompts::new(costs, 7, None);
            for request in 0..600 {
                let tokens = 12 + request as u32;
                let text = prompts.text(request, tokens, &[]);
                assert_eq!(invented.tokens(&text), tokens, "long {long}, digits {digits}: {text}");
            }
        }
    }

    #[tokio::test]
    async fn a_vocabulary_of_whole_words_needs_only_a_few_questions() {
        let (invented, costs) = measured(Invented { long: 99, digits: 1, asked: 0 }).await;
        assert!(invented.asked <= 8, "{} questions", invented.asked);
        assert_eq!(costs.single.len(), WORDS.len());
        let (_, costs) = measured(Invented { long: 4, digits: 1, asked: 0 }).await;
        let wanted: Vec<u32> = WORDS.iter().map(|word| 1 + u32::from(word.len() > 4)).collect();
        assert_eq!(costs.words, wanted);
    }

    #[tokio::test]
    async fn a_server_that_does_not_count_is_no_error() {
        struct Silent;

        impl Counts for Silent {
            async fn count(&mut self, _: &str) -> Result<Option<u32>, String> {
                Ok(None)
            }
        }

        assert_eq!(Costs::measure(&mut Silent).await, Ok(None));
    }

    #[tokio::test]
    async fn a_guess_is_a_token_for_every_word_and_digit() {
        let invented = Invented { long: 99, digits: 1, asked: 0 };
        let text = Prompts::new(Costs::guessed(), 3, None).text(0, 40, &[]);
        assert_eq!(invented.tokens(&text), 3 + 40, "but for the template, of which it cannot know");
    }

    #[tokio::test]
    async fn no_two_prompts_begin_with_the_same_word() {
        let (_, costs) = measured(Invented { long: 99, digits: 1, asked: 0 }).await;
        let prompts = Prompts::new(costs, 3, None);
        let firsts: HashSet<String> = (0..20_000)
            .map(|request| prompts.text(request, 20, &[]).split(' ').next().unwrap_or_default().to_owned())
            .collect();
        assert_eq!(firsts.len(), 20_000);
    }

    #[tokio::test]
    async fn groups_share_a_beginning_of_the_length_asked_for_and_nothing_else() {
        let (invented, costs) = measured(Invented { long: 4, digits: 1, asked: 0 }).await;
        let prompts = Prompts::new(costs, 3, Some((4, 50)));
        let texts: Vec<String> = (0..64).map(|request| prompts.text(request, 30, &[])).collect();
        assert!(texts.iter().all(|text| invented.tokens(text) == 80));
        let common = |a: &str, b: &str| a.split(' ').zip(b.split(' ')).take_while(|(a, b)| a == b).count();
        let mut groups: Vec<Vec<&String>> = Vec::new();
        for text in &texts {
            match groups.iter_mut().find(|group| common(group[0], text) > 0) {
                Some(group) => group.push(text),
                None => groups.push(vec![text]),
            }
        }
        assert_eq!(groups.len(), 4);
        for group in groups {
            let beginnings: HashSet<usize> = group[1..].iter().map(|text| common(group[0], text)).collect();
            assert_eq!(
                beginnings.len(),
                1,
                "all of a group share the same words, and no more: {beginnings:?}"
            );
        }
    }

    #[tokio::test]
    async fn requests_of_a_trace_share_the_text_of_the_blocks_they_share() {
        let (invented, costs) = measured(Invented { long: 99, digits: 1, asked: 0 }).await;
        let prompts = Prompts::new(costs, 3, None);
        let (one, other) = (prompts.text(0, 1500, &[5, 6]), prompts.text(1, 1300, &[5, 7]));
        assert_eq!((invented.tokens(&one), invented.tokens(&other)), (1500, 1300));
        let common = one.split(' ').zip(other.split(' ')).take_while(|(a, b)| a == b).count();
        // The template's three tokens and the digits of the number that is one word.
        assert_eq!(common, BLOCK_TOKENS as usize - 3 - (DIGITS as usize - 1));
        assert_eq!(prompts.text(0, 1500, &[5, 6]), one, "a second run says the same");
    }

    #[tokio::test]
    async fn a_prompt_shorter_than_its_number_is_still_there() {
        let (invented, costs) = measured(Invented { long: 99, digits: 1, asked: 0 }).await;
        let prompts = Prompts::new(costs, 3, None);
        let lengths: Vec<u32> =
            (1..=8).map(|tokens| invented.tokens(&prompts.text(9, tokens, &[]))).collect();
        assert_eq!(lengths, [4, 4, 4, 4, 5, 6, 7, 8], "three tokens are the template's, one is the number's");
    }
}
