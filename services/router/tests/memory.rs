//! What a large or hostile body costs: from the first byte on the wire to the last of the answer a router never holds
//! more than twice the body, whatever is in it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tandem_chassis::{Shutdown, seam};
use tandem_router::RouterConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Counts what is allocated. A block that grows is there twice while it is copied, as in most allocators.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator as it came; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = ALLOCATED.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract, which is the same there.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `at` came from `alloc` above with this layout, and so from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of a body, about.
const SIZE: usize = 6 << 20;
/// What a request takes however small its body is: buffers of its connection, an answer, and what the tokenizer needs
/// for a text that fits into the context, which the context bounds and not the body.
const SMALL: usize = 1 << 20;
/// Tokens of the context: as many as a prompt may have.
const CONTEXT: u32 = 4096;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

struct Case {
    name: &'static str,
    path: &'static str,
    body: Vec<u8>,
    /// In chunks, without a length that is known from the beginning.
    chunked: bool,
}

/// `before`, then `piece` until the body is as large as it is to be, then `after`.
fn filled(before: &str, piece: &str, after: &str) -> Vec<u8> {
    let pieces = (SIZE - before.len() - after.len()) / piece.len();
    [before.as_bytes(), piece.repeat(pieces).as_bytes(), after.as_bytes()].concat()
}

fn completion(prompt: &str, piece: &str, after: &str) -> Vec<u8> {
    filled(&format!(r#"{{"model":"m","max_tokens":1,"prompt":{prompt}"#), piece, &format!("{after}}}"))
}

fn chat(field: &str, piece: &str, after: &str) -> Vec<u8> {
    let before = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}],{field}"#);
    filled(&before, piece, &format!("{after}}}"))
}

/// `before`, then entries with keys that are all different, then `after`. `fill` makes the keys this long.
fn keys(before: &str, fill: &str, length: usize, after: &str) -> Vec<u8> {
    let fill = fill.repeat(length / fill.len().max(1));
    let mut body = before.as_bytes().to_vec();
    for at in 0.. {
        let key = format!(",\"{at}{fill}\":0");
        if body.len() + key.len() + after.len() > SIZE {
            break;
        }
        body.extend_from_slice(key.as_bytes());
    }
    body.extend_from_slice(after.as_bytes());
    body
}

fn cases() -> Vec<Case> {
    let message = |content: &str| format!(r#"{{"model":"m","messages":[{{"role":"user","content":{content}"#);
    let fits = " word".repeat(200);
    let cases: Vec<(&str, &str, Vec<u8>)> = vec![
        ("brackets without end", COMPLETIONS, filled("", "[", "")),
        ("objects within each other", CHAT, filled("", "{\"a\":", "")),
        ("deep in a field that nobody knows", CHAT, chat(r#""x":"#, "[", "")),
        ("space", CHAT, filled("", " ", "")),
        ("space within an object", CHAT, filled("{", "\n", "}")),
        ("no JSON at all", CHAT, filled("", "nonsense ", "")),
        ("not UTF-8 at the end", CHAT, [filled("{\"a\":\"", "b", ""), vec![0xff]].concat()),
        ("cut off within a string", CHAT, filled("{\"model\":\"", "m\\n", "")),
        ("something behind the object", CHAT, filled("{\"model\":\"m\"}", "{}", "")),
        ("a prompt of one letter", COMPLETIONS, completion("\"", "a", "\"")),
        ("a prompt of words", COMPLETIONS, completion("\"", "seven words that are not very long ", "\"")),
        ("a prompt of line ends", COMPLETIONS, completion("\"", "a line of text\\n", "\"")),
        ("a prompt of escapes", COMPLETIONS, completion("\"", "\\u0041\\\"\\\\", "\"")),
        ("a prompt of pairs of surrogates", COMPLETIONS, completion("\"", "\\ud83d\\ude00", "\"")),
        ("a prompt of halves of surrogates", COMPLETIONS, completion("\"", "\\ud83d", "\"")),
        ("a prompt of Chinese", COMPLETIONS, completion("\"", "\u{4f60}\u{597d}", "\"")),
        ("very many prompts", COMPLETIONS, completion("[\"a\"", ",\"a\"", "]")),
        ("256 long prompts", COMPLETIONS, {
            let prompt = format!(",\"{}\"", "a b\\n".repeat(SIZE / 257 / 5));
            completion("[\"a\"", &prompt, "]")
        }),
        ("a prompt of token ids", COMPLETIONS, completion("[1", ",1", "]")),
        ("prompts of token ids", COMPLETIONS, completion("[[1]", ",[1]", "]")),
        ("prompts of bad token ids", COMPLETIONS, completion("[[1]", ",[-1]", "]")),
        ("a prompt of lists in lists", COMPLETIONS, completion("[[[]", ",[]", "]]")),
        ("a prompt that is a long number", COMPLETIONS, completion("1", "1", "")),
        ("very many keys", CHAT, keys("{\"model\":\"m\"", "x", 1, "}")),
        ("a thousand long keys", CHAT, keys("{\"model\":\"m\"", "x", SIZE / 1000, "}")),
        ("a thousand long keys with escapes", CHAT, keys("{\"model\":\"m\"", "\\n", SIZE / 1000, "}")),
        ("a key, twice", CHAT, {
            let key = "k".repeat(SIZE / 2);
            format!("{{\"{key}\":1,\"{key}\":2}}").into_bytes()
        }),
        ("a key with escapes, twice", CHAT, {
            let key = "\\u0001".repeat(SIZE / 12);
            format!("{{\"model\":\"m\",\"{key}\":1,\"{key}\":2}}").into_bytes()
        }),
        ("one key", CHAT, filled("{\"model\":\"m\",\"", "key\\t", "\":1}")),
        ("one key within a message", CHAT, filled(&message("\"hi\",\""), "key\\t", "\":1}]}")),
        ("very many messages", CHAT, filled(&message("\"a\"}"), r#",{"role":"user","content":"a"}"#, "]}")),
        ("one long message", CHAT, filled(&message("\""), "some text\\n", "\"}]}")),
        ("a message of very many parts", CHAT, {
            filled(&message(r#"[{"type":"text","text":"a"}"#), r#",{"type":"text","text":"a"}"#, "]}]}")
        }),
        ("a message of long parts", CHAT, {
            let part = format!(r#",{{"type":"text","text":"{}"}}"#, "a line\\n".repeat(SIZE / 10 / 8));
            filled(&message(r#"[{"type":"text","text":"a"}"#), &part, "]}]}")
        }),
        (
            "a long role",
            CHAT,
            filled(r#"{"model":"m","messages":[{"role":""#, "role\\n", r#"","content":"a"}]}"#),
        ),
        ("a message of an unknown kind", CHAT, filled(&message(r#"[{"type":""#), "kind\\n", r#""}]}]}"#)),
        ("a long model", CHAT, filled(r#"{"messages":[],"model":""#, "model\\n", "\"}")),
        ("tools", CHAT, chat(r#""tools":[{}"#, ",{}", "]")),
        ("a long name of a format", CHAT, chat(r#""response_format":{"type":""#, "json\\n", "\"}")),
        ("a format of many keys", CHAT, chat(r#""response_format":{"type":"text""#, ",\"a\":1", "}")),
        ("a long service tier", CHAT, chat(r#""service_tier":""#, "flex\\n", "\"")),
        ("a long user", CHAT, chat(r#""user":""#, "user\\n", "\"")),
        ("a temperature of many digits", CHAT, chat(r#""temperature":1"#, "1", "")),
        ("a seed of many digits", CHAT, chat(r#""seed":1"#, "1", "")),
        ("a temperature that is a text", CHAT, chat(r#""temperature":""#, "hot\\n", "\"")),
        ("biases of very many tokens", CHAT, {
            keys(
                r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"logit_bias":{"0":0"#,
                "",
                0,
                "}}",
            )
        }),
        ("a bias of a long key", CHAT, chat(r#""logit_bias":{""#, "1\\u0031", "\":1}")),
        ("a long stop string", CHAT, chat(r#""stop":""#, "stop\\n", "\"")),
        ("very many stop strings", CHAT, chat(r#""stop":["a""#, ",\"a\"", "]")),
        ("very many stop tokens", CHAT, chat(r#""stop_token_ids":[1"#, ",1", "]")),
        (
            "stream options of many keys",
            CHAT,
            chat(r#""stream":true,"stream_options":{"a":1"#, ",\"a\":1", "}"),
        ),
        ("large arguments of the template", CHAT, chat(r#""chat_template_kwargs":{"a":[1"#, ",1", "]}")),
        ("a template", CHAT, chat(r#""chat_template":""#, "{{ x }}\\n", "\"")),
        ("metadata that nobody reads", CHAT, chat(r#""metadata":{"a":["b""#, ",\"b\\n\"", "]}")),
        ("a text to tokenize", "/tokenize", filled(r#"{"prompt":""#, "some text\\n", "\"}")),
        ("tokens to detokenize", "/detokenize", filled(r#"{"tokens":[1"#, ",1", "]}")),
        ("a path that is not there", "/v1/nothing", filled("{", " ", "}")),
        // As long as the context allows: these go as far as that can be without a worker.
        ("a prompt that fits", COMPLETIONS, { completion(&format!("\"{fits}\",\"user\":\""), "u\\n", "\"") }),
        ("messages that fit", CHAT, filled(&message(&format!("\"{fits}\"}}],\"user\":\"")), "u\\n", "\"}")),
    ];
    let twice = |(name, path, body): (&'static str, &'static str, Vec<u8>)| {
        [false, true].map(|chunked| Case { name, path, body: body.clone(), chunked })
    };
    cases.into_iter().flat_map(twice).collect()
}

/// Sends a body and reads the answer to its end; returns its status and length. Allocates next to nothing itself.
async fn send(address: SocketAddr, case: &Case) -> (u16, usize) {
    let mut stream = seam::connect_tcp(address).await.expect("the router listens");
    let framing = match case.chunked {
        true => "transfer-encoding: chunked".to_owned(),
        false => format!("content-length: {}", case.body.len()),
    };
    let head = format!(
        "POST {} HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\nconnection: close\r\n{framing}\r\n\r\n",
        case.path
    );
    stream.write_all(head.as_bytes()).await.expect("it reads the head");
    // What is not read to its end is answered all the same, by a connection that closes.
    if case.chunked {
        for chunk in case.body.chunks(60_001) {
            let begin = stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes()).await;
            if begin.and(stream.write_all(chunk).await).and(stream.write_all(b"\r\n").await).is_err() {
                break;
            }
        }
        let _ = stream.write_all(b"0\r\n\r\n").await;
    } else {
        let _ = stream.write_all(&case.body).await;
    }
    let (mut first, mut buffer, mut length) = ([0; 12], [0; 4096], 0);
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        if length == 0 && read >= 12 {
            first.copy_from_slice(&buffer[..12]);
        }
        length += read;
    }
    let status = std::str::from_utf8(&first[9..]).ok().and_then(|status| status.parse().ok());
    (status.unwrap_or(0), length)
}

#[test]
fn no_body_costs_more_than_twice_its_memory() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints/qwen3");
        let config = RouterConfig {
            id: Some("router-0".into()),
            port: 0,
            admin_port: 0,
            model: Some(model),
            model_name: Some("m".into()),
            context_tokens: Some(CONTEXT),
            ..RouterConfig::defaults()
        };
        let end = Shutdown::new();
        let membership = Arc::new(tandem_cluster::Embedded::new());
        let router = tandem_router::start(config, membership, end.clone()).await.expect("it starts");
        let cases = cases();
        // What is made once: threads, what the tokenizer and the template keep.
        for case in cases.iter().filter(|case| case.name.contains("fit")) {
            send(router.api, case).await;
        }
        let mut dear = Vec::new();
        for case in &cases {
            let before = ALLOCATED.load(Relaxed);
            PEAK.store(before, Relaxed);
            let (status, length) = send(router.api, case).await;
            let peak = PEAK.load(Relaxed).saturating_sub(before);
            let times = peak as f64 / case.body.len() as f64;
            println!("{times:>5.2} {status} {length:>6} {} chunked: {}", case.name, case.chunked);
            if peak > 2 * case.body.len() + SMALL {
                dear.push(format!("{} (chunked: {}): {times:.2} times the body", case.name, case.chunked));
            }
            let left = ALLOCATED.load(Relaxed).saturating_sub(before);
            if left > SMALL {
                dear.push(format!("{} (chunked: {}): {left} bytes are left", case.name, case.chunked));
            }
            // Nothing of a body comes back in an error but its beginning.
            let expected = if case.name.contains("fit") { 503..504 } else { 400..504 };
            if !expected.contains(&status) || length > 4096 {
                dear.push(format!("{} (chunked: {}): {status}, {length} bytes", case.name, case.chunked));
            }
        }
        assert!(dear.is_empty(), "{dear:#?}");
        end.drain();
        router.join().await;
    });
}
