//! Who is asked: its model, how it counts tokens, and what its router spends.

use std::time::Duration;

use bytes::Bytes;
use hyper::Uri;
use serde_json::{Value, json};
use tandem_chassis::group::Group;
use tandem_chassis::seam;

use super::BenchConfig;
use super::prompts::Counts;
use crate::http;

/// So long the router's admin port may take where nobody said that there is one.
const ADMIN_MAX: Duration = Duration::from_secs(2);

/// A model behind an API.
pub struct Served {
    base: String,
    model: String,
    chat: bool,
    /// Whether `/tokenize` answers; not known before the first question.
    tokenizes: Option<bool>,
}

/// What a router has spent.
pub struct Router {
    /// Processor time so far.
    pub seconds: f64,
    /// Whether workers run in its process.
    pub shared: bool,
}

/// The address of an API, such as `http://host:8000`.
pub fn address(url: &str) -> Result<Uri, String> {
    let wrong = || format!("{url:?} is no address of an API: write it like http://127.0.0.1:8000");
    let uri: Uri = url.trim_end_matches('/').parse().map_err(|_| wrong())?;
    if uri.scheme_str() != Some("http") || uri.host().is_none() {
        return Err(wrong());
    }
    Ok(uri)
}

impl Served {
    /// The model that the options name, or the only one that is listed.
    pub async fn find(config: &BenchConfig) -> Result<Served, String> {
        let base = config.url.trim_end_matches('/').to_owned();
        let model = match &config.model {
            Some(model) => model.clone(),
            None => {
                let list = http::get_json(&format!("{base}/v1/models")).await?;
                let rows = list["data"].as_array().map_or(&[][..], |rows| rows);
                let names: Vec<&str> = rows.iter().filter_map(|row| row["id"].as_str()).collect();
                match names[..] {
                    [] => return Err(format!("{base} lists no model; name one with --model")),
                    [name] => name.to_owned(),
                    _ => return Err(format!("name one of its models with --model: {}", names.join(", "))),
                }
            }
        };
        Ok(Served { base, model, chat: config.endpoint == "chat", tokenizes: None })
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Where requests go.
    pub fn endpoint(&self) -> String {
        format!("{}/v1/{}completions", self.base, if self.chat { "chat/" } else { "" })
    }

    /// A body in three pieces, between which the prompt's text and the number of tokens stand.
    pub fn body(&self, stream: bool) -> (String, String, String) {
        let mut fields =
            json!({ "model": self.model, "temperature": 0, "ignore_eos": true, "stream": stream });
        if stream {
            fields["stream_options"] = json!({ "include_usage": true });
        }
        let fields = fields.to_string();
        let fields = fields.strip_suffix('}').expect("an object").to_owned();
        let (open, close) = match self.chat {
            true => (r#","messages":[{"role":"user","content":""#, r#""}],"max_tokens":"#),
            false => (r#","prompt":""#, r#"","max_tokens":"#),
        };
        (fields + open, close.to_owned(), "}".to_owned())
    }

    /// What the router has spent; nothing where no router answers and nobody said that there is one.
    pub async fn router(&self, config: &BenchConfig) -> Result<Option<Router>, String> {
        if let Some(pid) = config.router_pid {
            return Ok(Some(Router { seconds: Group::of(pid.into()).cpu_seconds(), shared: false }));
        }
        let admin = match &config.admin {
            Some(admin) => admin.trim_end_matches('/').to_owned(),
            None => {
                let url = address(&self.base)?;
                let port = url.port_u16().unwrap_or(80);
                let Some(next) = port.checked_add(1) else { return Ok(None) };
                format!("http://{}:{next}", url.host().unwrap_or_default())
            }
        };
        let state = seam::timeout(ADMIN_MAX, http::get_json(&format!("{admin}/admin/state"))).await;
        let state = state.unwrap_or_else(|_| Err(format!("{admin}/admin/state: no answer")));
        let state = match state {
            Ok(state) => state,
            Err(why) if config.admin.is_some() => return Err(why),
            Err(_) => return Ok(None),
        };
        let Some(seconds) = state["cpu_seconds"].as_f64().filter(|_| state["kind"] == "router") else {
            return match &config.admin {
                Some(admin) => Err(format!("--admin {admin} is no router's admin port")),
                None => Ok(None),
            };
        };
        let cluster = http::get_json(&format!("{admin}/admin/cluster")).await.unwrap_or_default();
        let workers = cluster["workers"].as_array().map_or(&[][..], |rows| rows);
        let shared = workers.iter().any(|worker| worker["pid"] == state["pid"]);
        Ok(Some(Router { seconds, shared }))
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Value, String> {
        use futures_util::TryStreamExt;
        let stream = http::post_stream(&format!("{}{path}", self.base), body).await?;
        let pieces: Vec<Bytes> = stream.try_collect().await?;
        serde_json::from_slice(&pieces.concat())
            .map_err(|error| format!("{}{path}: not JSON: {error}", self.base))
    }

    fn prompt(&self, text: &str) -> Value {
        match self.chat {
            true => json!({ "model": self.model, "messages": [{ "role": "user", "content": text }] }),
            false => json!({ "model": self.model, "prompt": text }),
        }
    }
}

impl Served {
    /// As `/tokenize` counts.
    async fn tokenized(&self, text: &str) -> Option<u32> {
        let answer = self.post("/tokenize", &self.prompt(text)).await;
        Some(answer.ok()?["count"].as_u64()? as u32)
    }

    /// As the usage of a small request counts.
    async fn used(&self, text: &str) -> Result<Option<u32>, String> {
        let mut body = self.prompt(text);
        body["max_tokens"] = 1.into();
        let path = self.endpoint();
        let answer = self.post(path.strip_prefix(&self.base).expect("it begins so"), &body).await?;
        Ok(answer["usage"]["prompt_tokens"].as_u64().map(|count| count as u32))
    }
}

impl Counts for Served {
    async fn count(&mut self, text: &str) -> Result<Option<u32>, String> {
        if self.tokenizes != Some(false)
            && let Some(count) = self.tokenized(text).await
        {
            if self.tokenizes == Some(true) {
                return Ok(Some(count));
            }
            // It is believed where both say the same: a template or a first token may be counted by one only.
            let used = self.used(text).await?;
            self.tokenizes = Some(used.is_none_or(|used| used == count));
            return Ok(used.or(Some(count)));
        }
        self.tokenizes = Some(false);
        self.used(text).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_json_with_prompt_and_length_in_their_places() {
        for chat in [false, true] {
            for stream in [false, true] {
                let served = Served { base: String::new(), model: "a \"b\"".into(), chat, tokenizes: None };
                let (before, behind, end) = served.body(stream);
                let body: Value =
                    serde_json::from_str(&format!("{before}12 time{behind}7{end}")).expect("JSON");
                assert_eq!((&body["model"], &body["max_tokens"]), (&json!("a \"b\""), &json!(7)));
                let text = if chat { &body["messages"][0]["content"] } else { &body["prompt"] };
                assert_eq!((text, &body["stream"]), (&json!("12 time"), &json!(stream)));
                assert_eq!(body["stream_options"].is_object(), stream);
            }
        }
    }
}
