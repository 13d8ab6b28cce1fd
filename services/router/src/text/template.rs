//! Chat templates: Jinja as Hugging Face writes it, rendered by minijinja.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde};
use minijinja::{Environment, Error, ErrorKind, Value as Jinja, context};
use serde::Serialize;
use serde_json::Value;
use tandem_chassis::seam;

use super::{OpenError, optional_json};

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// Why a chat cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateError {
    /// The model has none.
    #[error("this model has no chat template; use /v1/completions")]
    Missing,
    /// The template says that the chat is not as it must be.
    #[error("{0}")]
    Refused(String),
    /// It cannot be rendered.
    #[error("the chat template cannot be rendered: {0}")]
    Render(String),
}

/// A compiled chat template.
pub(crate) struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

impl Template {
    /// From `chat_template.jinja`, or from `tokenizer_config.json`, where it may be a list with one called
    /// `default`.
    pub(crate) fn open(dir: &Path) -> Result<Option<Template>, OpenError> {
        let config_file = dir.join("tokenizer_config.json");
        let config = optional_json(&config_file)?;
        let file = dir.join("chat_template.jinja");
        let (file, source) = match std::fs::read_to_string(&file) {
            Ok(source) => (file, Some(source)),
            Err(_) => (config_file, from_config(&config["chat_template"])),
        };
        let Some(source) = source else { return Ok(None) };
        let token = |key: &str| {
            let token = &config[key];
            token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
        };
        Template::new(source, token("bos_token"), token("eos_token"))
            .map(Some)
            .map_err(|fact| OpenError { file, fact })
    }

    /// From its source; the error says what is wrong with it.
    pub(super) fn new(source: String, bos: String, eos: String) -> Result<Template, String> {
        let mut environment = environment();
        let added = environment.add_template_owned(NAME, source);
        added.map_err(|error| format!("the chat template is broken: {error:#}"))?;
        Ok(Template { environment, bos, eos })
    }

    pub(crate) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &serde_json::Map<String, Value>,
    ) -> Result<String, TemplateError> {
        let template = self.environment.get_template(NAME).expect("it was added when it was opened");
        let own = context! {
            messages => Jinja::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => Jinja::from(()),
            documents => Jinja::from(()),
        };
        let extra = Jinja::from(Serde(extra));
        template.render(context! { ..extra, ..own }).map_err(|error| match error.kind() {
            ErrorKind::InvalidOperation if error.detail().is_some_and(|d| d.starts_with(RAISED)) => {
                let detail = error.detail().unwrap_or_default();
                TemplateError::Refused(detail.trim_start_matches(RAISED).to_owned())
            }
            _ => TemplateError::Render(format!("{error:#}")),
        })
    }
}

fn from_config(template: &Value) -> Option<String> {
    if let Some(text) = template.as_str() {
        return Some(text.to_owned());
    }
    let named = template.as_array()?.iter().find(|entry| entry["name"] == "default");
    named.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
}

/// Marks errors that a template raises itself.
const RAISED: &str = "raised: ";

/// What Hugging Face's renderer offers to templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the usual delimiters"));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    environment.add_function("strftime_now", |format: String| strftime(&format, seam::unix_time().as_secs()));
    environment.add_filter("tojson", to_json);
    environment
}

/// JSON with Python's spacing: `{"a": 1, "b": [1, 2]}`.
fn to_json(value: Jinja, _: Rest<Jinja>, options: Kwargs) -> Result<Jinja, Error> {
    let indent: Option<usize> = options.get("indent").ok();
    let _: Option<bool> = options.get("ensure_ascii").ok();
    let value: Value = serde_json::to_value(&value)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    let mut text = String::new();
    write_json(&value, indent, 0, &mut text);
    Ok(Jinja::from_safe_string(text))
}

fn write_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(out, depth + 1);
                write_json(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push(']');
        }
        Value::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(out, depth + 1);
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push_str(": ");
                write_json(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// The directives that chat templates use, in UTC.
fn strftime(format: &str, unix_seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, month, day) = civil(days as i64);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{:02}", seconds / 3600)),
            Some('M') => out.push_str(&format!("{:02}", seconds / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", seconds % 60)),
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a day since 1970-01-01, in the Gregorian calendar (eras of 400 years).
fn civil(days: i64) -> (i64, u32, u32) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = (of_year - (153 * shifted + 2) / 5 + 1) as u32;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 } as u32;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[(&str, &str)]) -> Result<String, TemplateError> {
        let mut environment = environment();
        environment.add_template_owned(NAME, source.to_owned()).expect("a template");
        let template = Template { environment, bos: "<s>".into(), eos: "</s>".into() };
        let messages: Vec<Message> =
            messages.iter().map(|(r, c)| Message { role: r.to_string(), content: c.to_string() }).collect();
        template.render(&messages, true, &Default::default())
    }

    #[test]
    fn a_template_like_llama_3s_renders() {
        let source = "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + \
             '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}\
             {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}";
        let text = render(source, &[("user", "  hi  ")]).unwrap();
        assert_eq!(
            text,
            "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn what_a_template_raises_is_its_own_sentence() {
        let source =
            "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with user.') }}{% endif %}";
        let error = render(source, &[("assistant", "x")]).unwrap_err();
        assert!(matches!(&error, TemplateError::Refused(text) if text == "Begin with user."), "{error}");
    }

    #[test]
    fn python_methods_namespaces_and_loop_variables_work() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}\
             {{ m.content.strip().upper() }}{% if not loop.last %},{% endif %}{% endfor %}={{ ns.n }}";
        assert_eq!(render(source, &[("user", " a "), ("user", "b")]).unwrap(), "A,B=3");
    }

    #[test]
    fn json_has_pythons_spacing() {
        let source = r#"{{ {"a": [1, 2], "b": "é<"} | tojson }}"#;
        assert_eq!(render(source, &[]).unwrap(), r#"{"a": [1, 2], "b": "é<"}"#);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y", 1_700_000_000), "14 Nov 2023");
        assert_eq!(strftime("%A, %B %d %H:%M:%S", 951_782_400), "Tuesday, February 29 00:00:00");
        assert_eq!(strftime("100%% %q", 0), "100% %q");
    }
}
