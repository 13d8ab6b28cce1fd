//! `tandem status`: the processes of a cluster, asked from a router's admin port.

use std::ffi::OsString;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::Value;

use crate::http;

/// Show the processes of a running cluster
#[derive(Debug, clap::Parser, Serialize)]
#[command(name = "tandem status")]
struct StatusConfig {
    /// Admin port of a router
    #[arg(long, default_value = "http://127.0.0.1:8001")]
    admin: String,
    /// Print /admin/cluster as it is
    #[arg(long)]
    json: bool,
}

pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let config: StatusConfig = tandem_chassis::config::load(arguments);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(show(&config)) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn show(config: &StatusConfig) -> Result<String, String> {
    let base = config.admin.trim_end_matches('/');
    let cluster = http::get_json(&format!("{base}/admin/cluster")).await?;
    if config.json {
        return serde_json::to_string_pretty(&cluster).map_err(|e| e.to_string());
    }
    let mut rows = vec![HEAD.map(str::to_owned)];
    for list in ["routers", "workers", "stores"] {
        for process in cluster[list].as_array().into_iter().flatten() {
            let admin = process["admin"].as_str().unwrap_or_default();
            let state = http::get_json(&format!("http://{admin}/admin/state")).await.unwrap_or_default();
            rows.push(row(process, &state));
        }
    }
    Ok(table(&rows))
}

const HEAD: [&str; 9] = ["ID", "ROLE", "STATE", "RUNNING", "WAITING", "LEASES", "KV", "ADDRESS", "ADMIN"];

fn row(process: &Value, state: &Value) -> [String; 9] {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let blocks = &state["blocks"];
    let kv = match (blocks["in_use"].as_u64(), blocks["cached"].as_u64(), blocks["total"].as_u64()) {
        (Some(in_use), Some(cached), Some(total)) if total > 0 => {
            format!("{in_use}+{cached}/{total}")
        }
        _ => "-".to_owned(),
    };
    [
        text(&process["id"]),
        text(&process["role"]),
        text(&process["state"]),
        text(&state["running"]),
        text(&state["waiting"]),
        text(&state["leases"]),
        kv,
        text(&process["address"]),
        text(&process["admin"]),
    ]
}

/// Columns as wide as their widest cell.
fn table(rows: &[[String; 9]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..9).map(width).collect();
    let line = |row: &[String; 9]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    let mut lines: Vec<String> = rows.iter().map(line).collect();
    lines.push(String::new());
    lines.push("KV is blocks in use + cached / total".to_owned());
    lines.join("\n")
}
