// What application developers do with openai's Node package, unmodified, against a cluster.
//
//     node suite.mjs API_URL ADMIN_URL
//
// It runs in a folder where the package is installed. Every check has a name; `suite.py` and
// `suite_faults.py` have the same ones.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { createServer } from "node:net";

// The package is in the working folder, not beside this file: nothing is installed into the repository.
const require = createRequire(`${process.cwd()}/package.json`);
const OpenAI = require("openai");

const [BASE, ADMIN] = process.argv.slice(2);
const TIMEOUT = 120_000;
let requests = 0;

function clientWith({ onStatus, ...options } = {}) {
  const counted = async (url, init) => {
    requests += 1;
    const response = await fetch(url, init);
    await onStatus?.(response.status);
    return response;
  };
  return new OpenAI({ baseURL: BASE, apiKey: "unused", maxRetries: 0, timeout: TIMEOUT, fetch: counted, ...options });
}

const client = clientWith();
const MODEL = (await client.models.list()).data[0].id;
const QUESTION = [{ role: "user", content: "What is 2+2?" }];
const STORY = [{ role: "user", content: "Tell me a story." }];
const PROMPT = "Once there was";
const IMAGE = { type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } };
const TOOL = { type: "function", function: { name: "f", parameters: {} } };

const CHECKS = [];

function check(name, run) {
  CHECKS.push({ name, run });
}

const chatBody = (messages, given) => ({ model: MODEL, messages, temperature: 0, max_tokens: 24, ...given });
const completionBody = (prompt, given) => ({ model: MODEL, prompt, temperature: 0, max_tokens: 12, ...given });
const chat = (messages = QUESTION, given = {}, options = {}) =>
  client.chat.completions.create(chatBody(messages, given), options);
const complete = (prompt = PROMPT, given = {}, options = {}) =>
  client.completions.create(completionBody(prompt, given), options);
const content = (answer, choice = 0) => answer.choices[choice].message.content;
const drawn = (answer) => answer.choices[0].token_ids;
const same = assert.deepEqual;
const distinct = (items) => new Set(items).size;
const until = (text, stop) => text.slice(0, text.indexOf(stop));

async function collected(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

// The text of one choice of chat chunks.
function said(chunks, choice = 0) {
  const choices = chunks.flatMap((chunk) => chunk.choices).filter((c) => c.index === choice);
  return choices.map((c) => c.delta.content ?? "").join("");
}

// The text of one choice of chunks of completions.
function written(chunks, choice = 0) {
  const choices = chunks.flatMap((chunk) => chunk.choices).filter((c) => c.index === choice);
  return choices.map((c) => c.text).join("");
}

const greedyToken = async () => drawn(await chat(QUESTION, { max_tokens: 1, return_token_ids: true }))[0];

async function refused(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.equal(error.constructor, kind, `${error.constructor.name} is not ${kind.name}: ${error}`);
    return error;
  }
  assert.fail("it is not refused");
}

async function wrong(call, code, param) {
  const error = await refused(OpenAI.BadRequestError, call);
  same([error.status, error.code, error.param], [400, code, param]);
  same(error.type, "invalid_request_error");
  assert(error.error.message && error.requestID);
}

async function cordon(wanted) {
  const { workers } = await (await fetch(`${ADMIN}/admin/cluster`)).json();
  for (const { id } of workers) {
    const response = await fetch(`${ADMIN}/admin/workers/${id}/cordon`, { method: wanted ? "POST" : "DELETE" });
    same(response.status, 200);
  }
}

// --- models

check("models: the list has the one model", async () => {
  same((await client.models.list()).object, "list");
  same((await collected(client.models.list())).map((model) => model.id), [MODEL]);
});

check("models: one is retrieved by its name", async () => {
  const model = await client.models.retrieve(MODEL);
  same([model.id, model.object], [MODEL, "model"]);
  assert(model.owned_by && model.created > 1_600_000_000);
});

check("models: the length of the context is an extra field", async () => {
  same((await client.models.retrieve(MODEL)).max_model_len, 2048);
});

check("models: an unknown one is not found", async () => {
  const error = await refused(OpenAI.NotFoundError, () => client.models.retrieve("other"));
  same([error.code, error.param, error.status], ["model_not_found", "model", 404]);
});

// --- chat completions

check("chat: a whole answer has every field", async () => {
  const answer = await chat();
  const [choice] = answer.choices;
  same([answer.object, answer.model, answer.choices.length], ["chat.completion", MODEL, 1]);
  assert(answer.id.startsWith("chatcmpl-") && answer.created > 1_600_000_000 && answer.system_fingerprint);
  same([choice.index, choice.message.role, choice.message.refusal], [0, "assistant", null]);
  same([choice.logprobs, choice.message.tool_calls], [null, undefined]);
  assert(["stop", "length"].includes(choice.finish_reason) && choice.message.content);
});

check("chat: usage adds up", async () => {
  const answer = await chat(QUESTION, { return_token_ids: true });
  const { usage } = answer;
  same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
  same(usage.completion_tokens, drawn(answer).length);
  same(usage.prompt_tokens, answer.prompt_token_ids.length);
  const cached = usage.prompt_tokens_details.cached_tokens;
  assert(cached >= 0 && cached < usage.prompt_tokens);
});

check("chat: the same question has the same answer at temperature 0", async () => {
  same(content(await chat()), content(await chat()));
});

check("chat: messages of every role are read", async () => {
  const roles = ["system", "developer", "user", "assistant", "user"];
  const long = await chat(roles.map((role) => ({ role, content: "Hello." })));
  const short = await chat([{ role: "user", content: "Hello." }]);
  assert(long.usage.prompt_tokens > 4 * short.usage.prompt_tokens - 8);
});

check("chat: content may be a list of text parts", async () => {
  const parts = [{ type: "text", text: "What is " }, { type: "text", text: "2+2?" }];
  same(content(await chat([{ role: "user", content: parts }])), content(await chat()));
});

check("chat: max_tokens bounds the answer", async () => {
  const answer = await chat(STORY, { max_tokens: 3 });
  same([answer.usage.completion_tokens, answer.choices[0].finish_reason], [3, "length"]);
});

check("chat: max_completion_tokens counts before max_tokens", async () => {
  const answer = await chat(STORY, { max_tokens: 9, max_completion_tokens: 5 });
  same(answer.usage.completion_tokens, 5);
});

check("chat: an answer that ends by itself says stop", async () => {
  same((await chat(QUESTION, { max_tokens: 200 })).choices[0].finish_reason, "stop");
});

check("chat: n draws several choices", async () => {
  const answer = await chat(STORY, { n: 3, temperature: 1, seed: 5, max_tokens: 8, ignore_eos: true });
  same(answer.choices.map((choice) => choice.index), [0, 1, 2]);
  same(answer.usage.completion_tokens, 24);
  assert(distinct(answer.choices.map((choice) => choice.message.content)) > 1);
});

check("chat: logprobs spell the answer", async () => {
  const answer = await chat(QUESTION, { logprobs: true });
  const tokens = answer.choices[0].logprobs.content;
  const spelled = Buffer.from(tokens.flatMap((token) => token.bytes)).toString();
  assert(spelled.startsWith(content(answer)), spelled);
  assert(tokens.every((token) => token.logprob <= 0 && token.top_logprobs.length === 0));
  same(answer.usage.completion_tokens, tokens.length);
});

check("chat: top_logprobs are the likeliest tokens in order", async () => {
  const answer = await chat(STORY, { logprobs: true, top_logprobs: 5, max_tokens: 6 });
  for (const token of answer.choices[0].logprobs.content) {
    const top = token.top_logprobs.map((entry) => entry.logprob);
    same(top, [...top].sort((a, b) => b - a));
    same(top.length, 5);
    same([token.token, token.logprob], [token.top_logprobs[0].token, top[0]]);
    assert(top.map(Math.exp).reduce((a, b) => a + b) < 1.0001);
  }
});

check("chat: top_logprobs may be 20", async () => {
  const answer = await chat(QUESTION, { logprobs: true, top_logprobs: 20, max_tokens: 1 });
  same(answer.choices[0].logprobs.content[0].top_logprobs.length, 20);
});

check("chat: a stop string ends the answer before itself", async () => {
  const whole = content(await chat(STORY, { max_tokens: 40 }));
  const stop = whole.slice(10, 14);
  const answer = await chat(STORY, { max_tokens: 40, stop });
  same([content(answer), answer.choices[0].finish_reason], [until(whole, stop), "stop"]);
  same(answer.choices[0].stop_reason, stop);
});

check("chat: of a list of stop strings the first to come counts", async () => {
  const whole = content(await chat(STORY, { max_tokens: 40 }));
  const [early, late] = [whole.slice(5, 9), whole.slice(20, 24)];
  const answer = await chat(STORY, { max_tokens: 40, stop: ["never said", late, early] });
  same(content(answer), whole.slice(0, Math.min(whole.indexOf(early), whole.indexOf(late))));
});

check("chat: a seed repeats what it drew", async () => {
  const drawings = [];
  for (const seed of [7, 7, 8, 9]) drawings.push(content(await chat(STORY, { temperature: 1.2, seed })));
  same(drawings[0], drawings[1]);
  assert(distinct(drawings) > 1);
});

check("chat: top_p that is very small is greedy", async () => {
  same(content(await chat(STORY, { temperature: 1, top_p: 0.000001 })), content(await chat(STORY)));
});

check("chat: logit_bias forces a token", async () => {
  const answer = await chat(QUESTION, { logit_bias: { 370: 100 }, max_tokens: 4, return_token_ids: true });
  same(drawn(answer), [370, 370, 370, 370]);
});

check("chat: logit_bias bans a token", async () => {
  const token = await greedyToken();
  const answer = await chat(QUESTION, { logit_bias: { [token]: -100 }, return_token_ids: true });
  assert(!drawn(answer).includes(token));
});

check("chat: frequency_penalty wears a token out", async () => {
  const given = { logit_bias: { 370: 100, 371: 90 }, max_tokens: 40, return_token_ids: true, ignore_eos: true };
  same([...new Set(drawn(await chat(QUESTION, given)))], [370]);
  assert(drawn(await chat(QUESTION, { ...given, frequency_penalty: 2 })).includes(371));
});

check("chat: presence_penalty makes for more words", async () => {
  const given = { max_tokens: 40, return_token_ids: true, ignore_eos: true };
  const plain = drawn(await chat(STORY, given));
  const shunned = drawn(await chat(STORY, { ...given, presence_penalty: 2 }));
  assert(distinct(shunned) > distinct(plain));
});

check("chat: response_format text is the default", async () => {
  same(content(await chat(QUESTION, { response_format: { type: "text" } })), content(await chat()));
});

check("chat: user, metadata, store and others are let through", async () => {
  const given = { user: "me", metadata: { a: "b" }, store: false, safety_identifier: "me", prompt_cache_key: "k" };
  same(content(await chat(QUESTION, given)), content(await chat()));
});

check("chat: service tiers of online work are taken", async () => {
  for (const service_tier of ["auto", "default", "fast", "priority", "scale"]) {
    same(content(await chat(QUESTION, { service_tier })), content(await chat()));
  }
});

check("chat: parameters that say nothing are no obstacle", async () => {
  const nothing = { tools: [], tool_choice: "none", parallel_tool_calls: true, modalities: ["text"], stop: null };
  const defaults = { logit_bias: {}, n: 1, logprobs: false, presence_penalty: 0 };
  same(content(await chat(QUESTION, { ...nothing, ...defaults })), content(await chat()));
});

check("chat: an unknown field is ignored", async () => {
  same(content(await chat(QUESTION, { no_such_field: [1, { a: null }] })), content(await chat()));
});

check("chat: an answer under way in text of several bytes", async () => {
  const words = "naïve – 日本 🦀";
  const answer = await chat([{ role: "user", content: words }], { max_tokens: 1 });
  assert(answer.usage.prompt_tokens > [...words].length);
});

// --- streams of chat completions

check("stream: the pieces are the whole answer", async () => {
  same(said(await collected(chat(STORY, { stream: true }))), content(await chat(STORY)));
});

check("stream: first the role, last the reason", async () => {
  const chunks = await collected(chat(STORY, { stream: true }));
  const whole = await chat(STORY);
  same(chunks[0].choices[0].delta.role, "assistant");
  const reasons = chunks.map((chunk) => chunk.choices[0].finish_reason);
  same(reasons.filter(Boolean), [whole.choices[0].finish_reason]);
  assert(reasons.at(-1));
  const { id, created } = chunks[0];
  for (const c of chunks) {
    same([c.id, c.object, c.model, c.created], [id, "chat.completion.chunk", MODEL, created]);
  }
});

check("stream: usage comes once and only if it is asked for", async () => {
  const chunks = await collected(chat(QUESTION, { stream: true, stream_options: { include_usage: true } }));
  same(chunks.at(-1).choices, []);
  const usage = chunks.filter((chunk) => chunk.usage).map((chunk) => chunk.usage);
  same(usage.length, 1);
  const whole = (await chat()).usage;
  for (const field of ["prompt_tokens", "completion_tokens", "total_tokens"]) same(usage[0][field], whole[field]);
  const plain = await collected(chat(QUESTION, { stream: true }));
  assert(plain.every((chunk) => chunk.usage === undefined));
});

check("stream: several choices interleave and are each whole", async () => {
  const given = { n: 3, temperature: 1, seed: 11, max_tokens: 10 };
  const whole = await chat(STORY, given);
  const chunks = await collected(chat(STORY, { ...given, stream: true }));
  same([0, 1, 2].map((i) => said(chunks, i)), [0, 1, 2].map((i) => content(whole, i)));
  const ended = chunks.flatMap((chunk) => chunk.choices).filter((c) => c.finish_reason).map((c) => c.index);
  same(ended.sort(), [0, 1, 2]);
});

check("stream: log probabilities are those of the whole answer", async () => {
  const given = { logprobs: true, top_logprobs: 2, max_tokens: 6 };
  const facts = (tokens) => tokens.map((t) => [t.token, t.logprob, t.top_logprobs.length]);
  const whole = facts((await chat(QUESTION, given)).choices[0].logprobs.content);
  const chunks = await collected(chat(QUESTION, { ...given, stream: true }));
  const pieces = chunks.map((chunk) => chunk.choices[0].logprobs).filter(Boolean);
  same(facts(pieces.flatMap((piece) => piece.content)), whole);
});

check("stream: nothing of a stop string comes out", async () => {
  const whole = content(await chat(STORY, { max_tokens: 40 }));
  const stop = whole.slice(12, 20);
  same(said(await collected(chat(STORY, { max_tokens: 40, stop: [stop], stream: true }))), until(whole, stop));
});

check("stream: token ids come with the pieces", async () => {
  const whole = await chat(QUESTION, { return_token_ids: true });
  const chunks = await collected(chat(QUESTION, { return_token_ids: true, stream: true }));
  same(chunks.flatMap((chunk) => chunk.choices[0].token_ids ?? []), drawn(whole));
  same(chunks[0].prompt_token_ids, whole.prompt_token_ids);
});

check("stream: the package's helper puts the chunks together", async () => {
  const stream = client.chat.completions.stream(chatBody(QUESTION, {}));
  let deltas = "";
  stream.on("content", (delta) => (deltas += delta));
  const final = content(await stream.finalChatCompletion());
  const whole = content(await chat());
  same([deltas, final], [whole, whole]);
});

check("stream: a client may leave early and come back", async () => {
  for await (const _ of await chat(STORY, { max_tokens: 1500, stream: true, ignore_eos: true })) break;
  assert(content(await chat()));
});

check("stream: an error comes as an exception of the call", async () => {
  await wrong(() => chat(QUESTION, { temperature: 9, stream: true }), "invalid_value", "temperature");
});

// --- raw and streaming responses, headers, options

check("raw: headers and the parsed answer", async () => {
  const { data, response, request_id } = await chat().withResponse();
  same([response.status, response.headers.get("content-type")], [200, "application/json"]);
  assert(request_id);
  same(response.headers.get("x-request-id"), request_id);
  same(content(data), content(await chat()));
});

check("raw: models", async () => {
  const { data } = await client.models.list().withResponse();
  same(data.data.map((model) => model.id), [MODEL]);
});

check("raw: an event stream line by line", async () => {
  const response = await chat(QUESTION, { max_tokens: 4, stream: true }).asResponse();
  assert(response.headers.get("content-type").startsWith("text/event-stream"));
  const lines = (await response.text()).split("\n").filter(Boolean);
  assert(lines.every((line) => line.startsWith("data: ")) && lines.length > 2);
  same(lines.at(-1), "data: [DONE]");
});

check("raw: a response is read when it is wanted", async () => {
  const response = await complete().asResponse();
  same((await response.json()).choices[0].text, (await complete()).choices[0].text);
});

check("request: its id is the client's own", async () => {
  same((await chat(QUESTION, {}, { headers: { "x-request-id": "mine-1" } }))._request_id, "mine-1");
  assert.notEqual((await chat())._request_id, (await chat())._request_id);
});

check("request: the route is told on request", async () => {
  const asked = { headers: { "x-tandem-debug": "route" } };
  const { response } = await chat(QUESTION, { max_tokens: 4 }, asked).withResponse();
  same(response.headers.get("x-tandem-route"), "prefill=prefill-0,decode=decode-0");
  const unasked = await chat(QUESTION, { max_tokens: 4 }).withResponse();
  assert(!unasked.response.headers.has("x-tandem-route"));
});

check("request: a query and headers of other clients are ignored", async () => {
  const ofProject = client.withOptions({ organization: "o", project: "p" });
  const answer = await ofProject.chat.completions.create(chatBody(QUESTION, {}), { query: { "api-version": "1" } });
  same(content(answer), content(await chat()));
});

// --- vLLM's parameters

check("vllm: top_k 1 is greedy", async () => {
  same(content(await chat(STORY, { temperature: 1.5, top_k: 1 })), content(await chat(STORY)));
});

check("vllm: min_p 1 is greedy", async () => {
  same(content(await chat(STORY, { temperature: 1.5, min_p: 1 })), content(await chat(STORY)));
});

check("vllm: repetition_penalty makes for more words", async () => {
  const given = { max_tokens: 40, return_token_ids: true, ignore_eos: true };
  const plain = drawn(await chat(STORY, given));
  const penalised = drawn(await chat(STORY, { ...given, repetition_penalty: 2 }));
  assert(distinct(penalised) > distinct(plain));
});

check("vllm: min_tokens holds the end off", async () => {
  const short = (await chat(QUESTION, { max_tokens: 200 })).usage.completion_tokens;
  const long = (await chat(QUESTION, { max_tokens: 200, min_tokens: short + 5 })).usage.completion_tokens;
  assert(long >= short + 5, `${short} ${long}`);
});

check("vllm: stop_token_ids end the answer and are named", async () => {
  const tokens = drawn(await chat(STORY, { return_token_ids: true }));
  const answer = await chat(STORY, { stop_token_ids: [tokens[4]], return_token_ids: true });
  same([answer.choices[0].finish_reason, answer.choices[0].stop_reason], ["stop", tokens[4]]);
  same(drawn(answer), tokens.slice(0, tokens.indexOf(tokens[4]) + 1));
});

check("vllm: ignore_eos goes on to the bound", async () => {
  const answer = await chat(QUESTION, { max_tokens: 60, ignore_eos: true });
  same([answer.usage.completion_tokens, answer.choices[0].finish_reason], [60, "length"]);
});

check("vllm: return_token_ids gives prompt and answer as tokens", async () => {
  const answer = await chat(QUESTION, { return_token_ids: true });
  const again = await complete(answer.prompt_token_ids, { max_tokens: 24, return_token_ids: true });
  same(drawn(again), drawn(answer));
  same(again.choices[0].prompt_token_ids, answer.prompt_token_ids);
});

check("vllm: include_stop_str_in_output keeps the stop string", async () => {
  const whole = content(await chat(STORY, { max_tokens: 40 }));
  const stop = whole.slice(10, 14);
  const answer = await chat(STORY, { max_tokens: 40, stop, include_stop_str_in_output: true });
  same(content(answer), until(whole, stop) + stop);
});

check("vllm: skip_special_tokens false shows them", async () => {
  const given = { skip_special_tokens: false, ignore_eos: true, logit_bias: { 1021: 100 }, max_tokens: 2 };
  same(content(await chat(QUESTION, given)), "<|endoftext|><|endoftext|>");
});

check("vllm: add_generation_prompt false leaves the answer's opening out", async () => {
  const plain = (await chat(QUESTION, { max_tokens: 1 })).usage.prompt_tokens;
  const without = (await chat(QUESTION, { max_tokens: 1, add_generation_prompt: false })).usage.prompt_tokens;
  assert(without < plain);
});

// --- completions

check("completions: a whole answer has every field", async () => {
  const answer = await complete();
  same([answer.object, answer.model, answer.choices.length], ["text_completion", MODEL, 1]);
  assert(answer.id.startsWith("cmpl-") && answer.created > 1_600_000_000);
  const [choice] = answer.choices;
  same([choice.index, choice.logprobs], [0, null]);
  assert(choice.text && ["stop", "length"].includes(choice.finish_reason));
  same(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

check("completions: sixteen tokens where nothing is said", async () => {
  const answer = await client.completions.create({ model: MODEL, prompt: PROMPT, ignore_eos: true });
  same([answer.usage.completion_tokens, answer.choices[0].finish_reason], [16, "length"]);
});

check("completions: several prompts have their answers in order", async () => {
  const prompts = [PROMPT, "What is", "Tom has"];
  const alone = [];
  for (const prompt of prompts) alone.push((await complete(prompt)).choices[0].text);
  same((await complete(prompts)).choices.map((choice) => choice.text), alone);
});

check("completions: a prompt of token ids is that text", async () => {
  const ids = (await complete(PROMPT, { return_token_ids: true })).choices[0].prompt_token_ids;
  same((await complete(ids)).choices[0].text, (await complete()).choices[0].text);
});

check("completions: lists of token ids are several prompts", async () => {
  const ids = (await complete(PROMPT, { return_token_ids: true })).choices[0].prompt_token_ids;
  const { text } = (await complete()).choices[0];
  same((await complete([ids, ids])).choices.map((choice) => choice.text), [text, text]);
});

check("completions: n for each of several prompts", async () => {
  const given = { n: 2, temperature: 1, seed: 1, max_tokens: 3, ignore_eos: true };
  const answer = await complete([PROMPT, "What is"], given);
  same(answer.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  same(answer.usage.completion_tokens, 12);
});

check("completions: logprobs name tokens, their likelihood and their places", async () => {
  const answer = await complete(PROMPT, { logprobs: 3, max_tokens: 6 });
  const { tokens, token_logprobs, top_logprobs, text_offset } = answer.choices[0].logprobs;
  for (const list of [tokens, token_logprobs, top_logprobs, text_offset]) {
    same(list.length, answer.usage.completion_tokens);
  }
  assert(tokens.join("").startsWith(answer.choices[0].text));
  same([text_offset[0], text_offset.at(-1)], [0, tokens.slice(0, -1).join("").length]);
  assert(token_logprobs.every((score) => score <= 0));
  assert(top_logprobs.every((top, i) => Object.keys(top).length <= 3 && tokens[i] in top));
});

check("completions: logprobs 0 has the drawn token alone", async () => {
  const { tokens, token_logprobs } = (await complete(PROMPT, { logprobs: 0, max_tokens: 2 })).choices[0].logprobs;
  same([tokens.length, token_logprobs.length], [2, 2]);
});

check("completions: stop as string and as list", async () => {
  const whole = (await complete(PROMPT, { max_tokens: 30 })).choices[0].text;
  const string = whole.slice(8, 12);
  for (const stop of [string, ["never said", string]]) {
    const [choice] = (await complete(PROMPT, { max_tokens: 30, stop })).choices;
    same([choice.text, choice.finish_reason], [until(whole, string), "stop"]);
  }
});

check("completions: a seed repeats what it drew", async () => {
  const drawings = [];
  for (const seed of [3, 3, 4, 5]) drawings.push((await complete(PROMPT, { temperature: 1.2, seed })).choices[0].text);
  same(drawings[0], drawings[1]);
  assert(distinct(drawings) > 1);
});

check("completions: penalties and biases are taken", async () => {
  const given = { logit_bias: { 370: 100, 371: 90 }, max_tokens: 40, frequency_penalty: 2, presence_penalty: 0.5 };
  const tokens = drawn(await complete(PROMPT, { ...given, return_token_ids: true, ignore_eos: true }));
  assert(tokens.includes(370) && tokens.includes(371));
});

check("completions: a stream is the whole answer", async () => {
  const chunks = await collected(complete(PROMPT, { stream: true }));
  same(written(chunks), (await complete()).choices[0].text);
  assert(chunks.every((chunk) => chunk.id === chunks[0].id && chunk.object === "text_completion"));
  assert(chunks.at(-1).choices[0].finish_reason);
});

check("completions: a stream with usage at its end", async () => {
  const chunks = await collected(complete(PROMPT, { stream: true, stream_options: { include_usage: true } }));
  const last = chunks.pop();
  same([last.choices, last.usage.completion_tokens], [[], (await complete()).usage.completion_tokens]);
  assert(chunks.every((chunk) => chunk.usage === null));
});

check("completions: a stream of several prompts", async () => {
  const prompts = [PROMPT, "What is"];
  const chunks = await collected(complete(prompts, { stream: true }));
  const whole = (await complete(prompts)).choices.map((choice) => choice.text);
  same([written(chunks, 0), written(chunks, 1)], whole);
});

check("completions: an empty suffix and best_of 1 say nothing", async () => {
  same((await complete(PROMPT, { suffix: "", best_of: 1 })).choices[0].text, (await complete()).choices[0].text);
});

check("completions: the likeliest of best_of, and the prompt's echo", async () => {
  const answer = await complete(PROMPT, { n: 1, best_of: 3, temperature: 1, seed: 5 });
  same(answer.choices.length, 1);
  assert(answer.usage.completion_tokens > answer.choices[0].text.length / 8);
  const echoed = PROMPT + (await complete()).choices[0].text;
  same((await complete(PROMPT, { echo: true })).choices[0].text, echoed);
  same((await complete(PROMPT, { echo: true, max_tokens: 0 })).choices[0].text, PROMPT);
});

check("completions: echo with logprobs scores the prompt as drawing it would", async () => {
  const answer = await complete(PROMPT, { echo: true, logprobs: 2, max_tokens: 0 });
  const scores = answer.choices[0].logprobs;
  same([scores.tokens.join(""), answer.usage.completion_tokens], [PROMPT, 0]);
  same([scores.token_logprobs[0], scores.top_logprobs[0]], [null, null]);
  assert(scores.token_logprobs.slice(1).every((score) => score <= 0));
  const drawn = (await complete(PROMPT, { logprobs: 2, max_tokens: 6 })).choices[0];
  const both = (await complete(PROMPT, { echo: true, logprobs: 2, max_tokens: 6 })).choices[0].logprobs;
  same(both.token_logprobs, [...scores.token_logprobs, ...drawn.logprobs.token_logprobs]);
  const given = { echo: true, logprobs: 2, max_tokens: 0 };
  const again = (await complete(PROMPT + drawn.text, given)).choices[0].logprobs;
  if (again.tokens.join() === both.tokens.join()) {
    same(again.token_logprobs.slice(scores.tokens.length), drawn.logprobs.token_logprobs);
  }
});

// --- errors

check("errors: an unknown model is not found", async () => {
  for (const call of [() => chat(QUESTION, { model: "other" }), () => complete(PROMPT, { model: "other" })]) {
    const error = await refused(OpenAI.NotFoundError, call);
    same([error.status, error.code, error.param], [404, "model_not_found", "model"]);
  }
});

check("errors: temperature out of range", async () => {
  await wrong(() => chat(QUESTION, { temperature: 2.5 }), "invalid_value", "temperature");
});

check("errors: no messages", async () => {
  await wrong(() => chat([]), "invalid_value", "messages");
});

check("errors: a role that nobody has", async () => {
  await wrong(() => chat([{ role: "cook", content: "hi" }]), "invalid_value", "messages[0].role");
});

check("errors: more than the context has", async () => {
  await wrong(() => chat(QUESTION, { max_tokens: 10 ** 6 }), "context_length_exceeded", "messages");
  await wrong(() => complete(Array(2048).fill(1)), "context_length_exceeded", "prompt");
});

check("errors: tools are not supported", async () => {
  await wrong(() => chat(QUESTION, { tools: [TOOL] }), "unsupported_parameter", "tools");
});

check("errors: a JSON schema is not supported", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "s", schema: {} } };
  await wrong(() => chat(QUESTION, { response_format }), "unsupported_parameter", "response_format");
});

check("errors: an image is not supported", async () => {
  const messages = [{ role: "user", content: [IMAGE] }];
  await wrong(() => chat(messages), "unsupported_parameter", "messages[0].content[0]");
});

check("errors: too many choices", async () => {
  await wrong(() => chat(QUESTION, { n: 1000 }), "invalid_value", "n");
});

check("errors: a bias for no token", async () => {
  await wrong(() => chat(QUESTION, { logit_bias: { 99999: 1 } }), "invalid_value", "logit_bias");
});

check("errors: top_logprobs without logprobs", async () => {
  await wrong(() => chat(QUESTION, { top_logprobs: 2 }), "invalid_value", "top_logprobs");
});

check("errors: too many stop strings", async () => {
  await wrong(() => chat(QUESTION, { stop: ["a", "b", "c", "d", "e"] }), "invalid_value", "stop");
});

check("errors: usage of a stream that is none", async () => {
  await wrong(() => chat(QUESTION, { stream_options: { include_usage: true } }), "invalid_value", "stream_options");
});

check("errors: a prompt of the wrong kind", async () => {
  await wrong(() => complete(7), "invalid_value", "prompt");
  await wrong(() => complete([99999]), "invalid_value", "prompt");
});

check("errors: a suffix is not supported", async () => {
  await wrong(() => complete(PROMPT, { suffix: "x" }), "unsupported_parameter", "suffix");
});

check("errors: a path that is not there", async () => {
  const error = await refused(OpenAI.NotFoundError, () => client.images.generate({ model: MODEL, prompt: "x" }));
  same([error.status, error.code], [404, "not_found"]);
});

// --- faults of the network and of the cluster

check("faults: a time-out is the package's own error", async () => {
  const long = chatBody(STORY, { max_tokens: 1500, ignore_eos: true });
  const call = () => client.chat.completions.create(long, { timeout: 50 });
  const error = await refused(OpenAI.APIConnectionTimeoutError, call);
  assert(error instanceof OpenAI.APIConnectionError);
});

check("faults: a connection that fails", async () => {
  const rude = createServer((socket) => socket.destroy());
  await new Promise((listening) => rude.listen(0, "127.0.0.1", listening));
  try {
    const lost = clientWith({ baseURL: `http://127.0.0.1:${rude.address().port}/v1` });
    await refused(OpenAI.APIConnectionError, () => lost.models.list());
  } finally {
    rude.close();
  }
});

check("faults: no worker is a 503 that says when to try again", async () => {
  await cordon(true);
  try {
    for (const stream of [false, true]) {
      const error = await refused(OpenAI.InternalServerError, () => chat(QUESTION, { stream }));
      same([error.status, error.code, error.type], [503, "no_worker", "server_error"]);
      same(error.headers.get("retry-after"), "1");
    }
  } finally {
    await cordon(false);
  }
});

check("faults: a 503 is tried again", async () => {
  const statuses = [];
  const onStatus = async (status) => {
    statuses.push(status);
    if (status === 503) await cordon(false);
  };
  await cordon(true);
  try {
    const again = clientWith({ maxRetries: 2, onStatus });
    const answer = await again.chat.completions.create(chatBody(QUESTION, {}));
    same(statuses, [503, 200]);
    same(content(answer), content(await chat()));
  } finally {
    await cordon(false);
  }
});

check("faults: a 400 is not tried again", async () => {
  const statuses = [];
  const again = clientWith({ maxRetries: 2, onStatus: (status) => statuses.push(status) });
  await refused(OpenAI.BadRequestError, () => again.chat.completions.create(chatBody([], {})));
  same(statuses, [400]);
});

// --- many at once

async function alone() {
  const texts = [];
  for (const seed of [0, 1, 2, 3]) texts.push(content(await chat(STORY, { temperature: 1, max_tokens: 12, seed })));
  return [...texts, ...texts, ...texts, ...texts];
}

check("many: sixteen at once answer as one does", async () => {
  const one = async (_, i) => content(await chat(STORY, { temperature: 1, max_tokens: 12, seed: i % 4 }));
  same(await Promise.all(Array.from({ length: 16 }, one)), await alone());
});

check("many: sixteen streams at once are each whole", async () => {
  const given = { temperature: 1, max_tokens: 12, stream: true };
  const one = async (_, i) => said(await collected(chat(STORY, { ...given, seed: i % 4 })));
  same(await Promise.all(Array.from({ length: 16 }, one)), await alone());
});

const { VERSION } = require("openai/version");
console.log("openai", VERSION, "on Node", process.version);
const failed = [];
for (const { name, run } of CHECKS) {
  try {
    await run();
  } catch (error) {
    // Every check is run, whatever became of the others.
    failed.push(name);
    console.error(`FAILED: ${name}`, error);
  }
}
console.log(`${CHECKS.length - failed.length} of ${CHECKS.length} checks passed with ${requests} requests`);
if (failed.length > 0) console.error("FAILED:", failed.join("; "));
process.exit(failed.length > 0 ? 1 : 0);
