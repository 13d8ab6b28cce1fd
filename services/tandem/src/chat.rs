//! `tandem chat`: a conversation with a running cluster, in the terminal.

use std::ffi::OsString;
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

use futures_util::StreamExt;
use serde::Serialize;
use serde_json::{Value, json};

use crate::http;

/// Talk to a running cluster
#[derive(Debug, clap::Parser, Serialize)]
#[command(name = "tandem chat")]
struct ChatConfig {
    /// Address of the cluster's API
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Model to talk to; by default the first one listed
    #[arg(long)]
    model: Option<String>,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 512)]
    max_tokens: u32,
    /// Instructions that stand before the conversation
    #[arg(long)]
    system: Option<String>,
}

pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let config: ChatConfig = tandem_chassis::config::load(arguments);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(talk(&config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn talk(config: &ChatConfig) -> Result<(), String> {
    let base = config.url.trim_end_matches('/');
    let model = match &config.model {
        Some(model) => model.clone(),
        None => {
            let models = http::get_json(&format!("{base}/v1/models")).await?;
            models["data"][0]["id"].as_str().ok_or("the cluster lists no model")?.to_owned()
        }
    };
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("Talking to {model} at {base}. /new starts over, /quit or Ctrl-D leaves.");
    }
    let system = config.system.iter().map(|text| json!({ "role": "system", "content": text }));
    let mut messages: Vec<Value> = system.clone().collect();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            eprint!("> ");
        }
        let Some(line) = lines.next() else { return Ok(()) };
        let line = line.map_err(|e| e.to_string())?;
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => return Ok(()),
            "/new" => {
                messages = system.clone().collect();
                continue;
            }
            text => messages.push(json!({ "role": "user", "content": text })),
        }
        match answer(config, base, &model, &messages).await {
            Ok(answer) => messages.push(json!({ "role": "assistant", "content": answer })),
            Err(why) if interactive => {
                eprintln!("error: {why}");
                messages.pop();
            }
            Err(why) => return Err(why),
        }
    }
}

/// Prints an answer as it comes and returns it whole.
async fn answer(config: &ChatConfig, base: &str, model: &str, messages: &[Value]) -> Result<String, String> {
    let body = json!({
        "model": model,
        "messages": messages,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "stream": true,
    });
    let mut stream = http::post_stream(&format!("{base}/v1/chat/completions"), &body).await?;
    let (mut pending, mut whole) = (Vec::new(), String::new());
    while let Some(bytes) = stream.next().await {
        pending.extend_from_slice(&bytes?);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let Some(data) = line.trim().strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                println!();
                return Ok(whole);
            }
            let event: Value = serde_json::from_str(data).map_err(|e| format!("a broken event: {e}"))?;
            if let Some(message) = event["error"]["message"].as_str() {
                println!();
                return Err(message.to_owned());
            }
            let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            print!("{text}");
            let _ = std::io::stdout().flush();
            whole.push_str(text);
        }
    }
    println!();
    Err("the answer broke off".to_owned())
}
