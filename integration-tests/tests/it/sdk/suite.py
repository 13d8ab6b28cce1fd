"""What application developers do with openai's Python package, unmodified, against a cluster.

    suite.py API_URL ADMIN_URL

Every check has a name; `suite.mjs` has the same ones. Those of the asynchronous client stand only here, because
Node has no other. `suite_faults.py` has the checks of errors and faults.
"""

import asyncio
import math
import sys
import traceback

import openai

import cluster
from cluster import *


# --- models


@check("models: the list has the one model")
def _():
    page = client.models.list()
    same(page.object, "list")
    same([model.id for model in client.models.list()], [MODEL])


@check("models: one is retrieved by its name")
def _():
    model = client.models.retrieve(MODEL)
    same((model.id, model.object), (MODEL, "model"))
    assert model.owned_by and model.created > 1_600_000_000


@check("models: the length of the context is an extra field")
def _():
    same(client.models.retrieve(MODEL).max_model_len, 2048)


@check("models: an unknown one is not found")
def _():
    error = refused(openai.NotFoundError, client.models.retrieve, model="other")
    same((error.code, error.param, error.status_code), ("model_not_found", "model", 404))


# --- chat completions


@check("chat: a whole answer has every field")
def _():
    answer = chat()
    choice = answer.choices[0]
    same((answer.object, answer.model, len(answer.choices)), ("chat.completion", MODEL, 1))
    assert answer.id.startswith("chatcmpl-") and answer.created > 1_600_000_000 and answer.system_fingerprint
    same((choice.index, choice.message.role, choice.message.refusal), (0, "assistant", None))
    same((choice.logprobs, choice.message.tool_calls), (None, None))
    assert choice.finish_reason in ("stop", "length") and choice.message.content


@check("chat: usage adds up")
def _():
    answer = chat(extra_body={"return_token_ids": True})
    usage = answer.usage
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    same(usage.completion_tokens, len(drawn(answer)))
    same(usage.prompt_tokens, len(answer.prompt_token_ids))
    assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


@check("chat: the same question has the same answer at temperature 0")
def _():
    same(content(chat()), content(chat()))


@check("chat: messages of every role are read")
def _():
    roles = ["system", "developer", "user", "assistant", "user"]
    long = chat([{"role": role, "content": "Hello."} for role in roles])
    short = chat([{"role": "user", "content": "Hello."}])
    assert long.usage.prompt_tokens > 4 * short.usage.prompt_tokens - 8, (long.usage, short.usage)


@check("chat: content may be a list of text parts")
def _():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    same(content(chat([{"role": "user", "content": parts}])), content(chat()))


@check("chat: max_tokens bounds the answer")
def _():
    answer = chat(STORY, max_tokens=3)
    same((answer.usage.completion_tokens, answer.choices[0].finish_reason), (3, "length"))


@check("chat: max_completion_tokens counts before max_tokens")
def _():
    answer = chat(STORY, max_tokens=9, max_completion_tokens=5)
    same(answer.usage.completion_tokens, 5)


@check("chat: an answer that ends by itself says stop")
def _():
    same(chat(max_tokens=200).choices[0].finish_reason, "stop")


@check("chat: n draws several choices")
def _():
    answer = chat(STORY, n=3, temperature=1, seed=5, max_tokens=8, extra_body={"ignore_eos": True})
    same([choice.index for choice in answer.choices], [0, 1, 2])
    same(answer.usage.completion_tokens, 24)
    assert len({choice.message.content for choice in answer.choices}) > 1


@check("chat: logprobs spell the answer")
def _():
    answer = chat(logprobs=True)
    tokens = answer.choices[0].logprobs.content
    spelled = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert spelled.startswith(content(answer)), (spelled, answer)
    assert all(token.logprob <= 0 and token.top_logprobs == [] for token in tokens)
    same(answer.usage.completion_tokens, len(tokens))


@check("chat: top_logprobs are the likeliest tokens in order")
def _():
    for token in chat(STORY, logprobs=True, top_logprobs=5, max_tokens=6).choices[0].logprobs.content:
        top = [entry.logprob for entry in token.top_logprobs]
        same((len(top), top), (5, sorted(top, reverse=True)))
        same((token.token, token.logprob), (token.top_logprobs[0].token, top[0]))
        assert sum(map(math.exp, top)) < 1.0001


@check("chat: top_logprobs may be 20")
def _():
    token = chat(logprobs=True, top_logprobs=20, max_tokens=1).choices[0].logprobs.content[0]
    same(len(token.top_logprobs), 20)


@check("chat: a stop string ends the answer before itself")
def _():
    whole = content(chat(STORY, max_tokens=40))
    stop = whole[10:14]
    answer = chat(STORY, max_tokens=40, stop=stop)
    same((content(answer), answer.choices[0].finish_reason), (whole[:whole.index(stop)], "stop"))
    same(answer.choices[0].stop_reason, stop)


@check("chat: of a list of stop strings the first to come counts")
def _():
    whole = content(chat(STORY, max_tokens=40))
    early, late = whole[5:9], whole[20:24]
    answer = chat(STORY, max_tokens=40, stop=["never said", late, early])
    cut = min(whole.index(early), whole.index(late))
    same(content(answer), whole[:cut])


@check("chat: a seed repeats what it drew")
def _():
    drawings = [content(chat(STORY, temperature=1.2, seed=seed)) for seed in (7, 7, 8, 9)]
    same(drawings[0], drawings[1])
    assert len(set(drawings)) > 1, drawings


@check("chat: top_p that is very small is greedy")
def _():
    same(content(chat(STORY, temperature=1, top_p=0.000001)), content(chat(STORY)))


@check("chat: logit_bias forces a token")
def _():
    answer = chat(logit_bias={"370": 100}, max_tokens=4, extra_body={"return_token_ids": True})
    same(drawn(answer), [370] * 4)


@check("chat: logit_bias bans a token")
def _():
    token = greedy_token()
    answer = chat(logit_bias={str(token): -100}, extra_body={"return_token_ids": True})
    assert token not in drawn(answer), answer


@check("chat: frequency_penalty wears a token out")
def _():
    given = {"logit_bias": {"370": 100, "371": 90}, "max_tokens": 40,
             "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    same(set(drawn(chat(**given))), {370})
    assert 371 in drawn(chat(frequency_penalty=2, **given))


@check("chat: presence_penalty makes for more words")
def _():
    given = {"max_tokens": 40, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    plain = drawn(chat(STORY, **given))
    shunned = drawn(chat(STORY, presence_penalty=2, **given))
    assert len(set(shunned)) > len(set(plain)), (plain, shunned)


@check("chat: response_format text is the default")
def _():
    same(content(chat(response_format={"type": "text"})), content(chat()))


@check("chat: user, metadata, store and others are let through")
def _():
    given = {"user": "me", "metadata": {"a": "b"}, "store": False, "safety_identifier": "me", "prompt_cache_key": "k"}
    same(content(chat(**given)), content(chat()))


@check("chat: service tiers of online work are taken")
def _():
    for tier in ("auto", "default", "fast", "priority", "scale"):
        same(content(chat(service_tier=tier)), content(chat()))


@check("chat: parameters that say nothing are no obstacle")
def _():
    given = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "stop": None,
             "logit_bias": {}, "n": 1, "logprobs": False, "presence_penalty": 0}
    same(content(chat(**given)), content(chat()))


@check("chat: an unknown field is ignored")
def _():
    same(content(chat(extra_body={"no_such_field": [1, {"a": None}]})), content(chat()))


@check("chat: an answer under way in text of several bytes")
def _():
    words = "naïve – 日本 🦀"
    tokens = chat([{"role": "user", "content": words}], max_tokens=1).usage.prompt_tokens
    assert tokens > len(words)


# --- streams of chat completions


@check("stream: the pieces are the whole answer")
def _():
    same(said(chat(STORY, stream=True)), content(chat(STORY)))


@check("stream: first the role, last the reason")
def _():
    chunks = list(chat(STORY, stream=True))
    whole = chat(STORY)
    same(chunks[0].choices[0].delta.role, "assistant")
    same([c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason],
         [whole.choices[0].finish_reason])
    assert chunks[-1].choices[0].finish_reason
    same({(c.id, c.object, c.model, c.created) for c in chunks},
         {(chunks[0].id, "chat.completion.chunk", MODEL, chunks[0].created)})


@check("stream: usage comes once and only if it is asked for")
def _():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    same(chunks[-1].choices, [])
    usage = [chunk.usage for chunk in chunks if chunk.usage]
    same(len(usage), 1)
    whole = chat().usage
    same((usage[0].prompt_tokens, usage[0].completion_tokens, usage[0].total_tokens),
         (whole.prompt_tokens, whole.completion_tokens, whole.total_tokens))
    assert all(chunk.usage is None for chunk in chat(stream=True))


@check("stream: several choices interleave and are each whole")
def _():
    given = {"n": 3, "temperature": 1, "seed": 11, "max_tokens": 10}
    whole = chat(STORY, **given)
    chunks = list(chat(STORY, stream=True, **given))
    same([said(chunks, i) for i in range(3)], [content(whole, i) for i in range(3)])
    same({c.index for chunk in chunks for c in chunk.choices if c.finish_reason}, {0, 1, 2})


@check("stream: log probabilities are those of the whole answer")
def _():
    given = {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    whole = [(t.token, t.logprob, len(t.top_logprobs)) for t in chat(**given).choices[0].logprobs.content]
    pieces = [c.choices[0].logprobs for c in chat(stream=True, **given) if c.choices[0].logprobs]
    same([(t.token, t.logprob, len(t.top_logprobs)) for piece in pieces for t in piece.content], whole)


@check("stream: nothing of a stop string comes out")
def _():
    whole = content(chat(STORY, max_tokens=40))
    stop = whole[12:20]
    same(said(chat(STORY, max_tokens=40, stop=[stop], stream=True)), whole[:whole.index(stop)])


@check("stream: token ids come with the pieces")
def _():
    extra = {"return_token_ids": True}
    whole = chat(extra_body=extra)
    chunks = list(chat(stream=True, extra_body=extra))
    same([t for c in chunks for t in getattr(c.choices[0], "token_ids", None) or []], drawn(whole))
    same(chunks[0].prompt_token_ids, whole.prompt_token_ids)


@check("stream: the package's helper puts the chunks together")
def _():
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    same((deltas, content(final)), (content(chat()),) * 2)


@check("stream: a client may leave early and come back")
def _():
    with chat(STORY, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}) as left:
        next(iter(left))
    assert content(chat())


@check("stream: an error comes as an exception of the call")
def _():
    wrong(chat, "invalid_value", "temperature", temperature=9, stream=True)


# --- raw and streaming responses, headers, options


@check("raw: headers and the parsed answer")
def _():
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    same((raw.status_code, raw.headers["content-type"]), (200, "application/json"))
    assert raw.headers["x-request-id"] and raw.request_id == raw.headers["x-request-id"]
    same(content(raw.parse()), content(chat()))


@check("raw: models")
def _():
    raw = client.models.with_raw_response.list()
    same([model.id for model in raw.parse()], [MODEL])


@check("raw: an event stream line by line")
def _():
    create = client.chat.completions.with_streaming_response.create
    with create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=4, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and len(lines) > 2
    same(lines[-1], "data: [DONE]")


@check("raw: a response is read when it is wanted")
def _():
    create = client.completions.with_streaming_response.create
    with create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12) as response:
        same(response.parse().choices[0].text, complete().choices[0].text)


@check("request: its id is the client's own")
def _():
    same(chat(extra_headers={"x-request-id": "mine-1"})._request_id, "mine-1")
    assert chat()._request_id != chat()._request_id


@check("request: the route is told on request")
def _():
    create = client.chat.completions.with_raw_response.create
    given = {"model": MODEL, "messages": QUESTION, "max_tokens": 4}
    raw = create(**given, extra_headers={"x-tandem-debug": "route"})
    same(raw.headers["x-tandem-route"], "prefill=prefill-0,decode=decode-0")
    assert "x-tandem-route" not in create(**given).headers


@check("request: a query and headers of other clients are ignored")
def _():
    client_of_project = client.with_options(default_headers={"OpenAI-Organization": "o", "OpenAI-Project": "p"})
    given = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    answer = client_of_project.chat.completions.create(**given, extra_query={"api-version": "1"})
    same(content(answer), content(chat()))


# --- vLLM's parameters


@check("vllm: top_k 1 is greedy")
def _():
    same(content(chat(STORY, temperature=1.5, extra_body={"top_k": 1})), content(chat(STORY)))


@check("vllm: min_p 1 is greedy")
def _():
    same(content(chat(STORY, temperature=1.5, extra_body={"min_p": 1})), content(chat(STORY)))


@check("vllm: repetition_penalty makes for more words")
def _():
    given = {"max_tokens": 40}
    extra = {"return_token_ids": True, "ignore_eos": True}
    plain = drawn(chat(STORY, extra_body=extra, **given))
    penalised = drawn(chat(STORY, extra_body={**extra, "repetition_penalty": 2.0}, **given))
    assert len(set(penalised)) > len(set(plain)), (plain, penalised)


@check("vllm: min_tokens holds the end off")
def _():
    short = chat(max_tokens=200).usage.completion_tokens
    long = chat(max_tokens=200, extra_body={"min_tokens": short + 5}).usage.completion_tokens
    assert long >= short + 5, (short, long)


@check("vllm: stop_token_ids end the answer and are named")
def _():
    tokens = drawn(chat(STORY, extra_body={"return_token_ids": True}))
    stop = tokens[4]
    answer = chat(STORY, extra_body={"stop_token_ids": [stop], "return_token_ids": True})
    same((answer.choices[0].finish_reason, answer.choices[0].stop_reason), ("stop", stop))
    same(drawn(answer), tokens[:tokens.index(stop) + 1])


@check("vllm: ignore_eos goes on to the bound")
def _():
    answer = chat(max_tokens=60, extra_body={"ignore_eos": True})
    same((answer.usage.completion_tokens, answer.choices[0].finish_reason), (60, "length"))


@check("vllm: return_token_ids gives prompt and answer as tokens")
def _():
    answer = chat(extra_body={"return_token_ids": True})
    again = complete(answer.prompt_token_ids, max_tokens=24, extra_body={"return_token_ids": True})
    same(drawn(again), drawn(answer))
    same(again.choices[0].prompt_token_ids, answer.prompt_token_ids)


@check("vllm: include_stop_str_in_output keeps the stop string")
def _():
    whole = content(chat(STORY, max_tokens=40))
    stop = whole[10:14]
    answer = chat(STORY, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True})
    same(content(answer), whole[:whole.index(stop) + len(stop)])


@check("vllm: skip_special_tokens false shows them")
def _():
    extra = {"skip_special_tokens": False, "ignore_eos": True}
    answer = chat(logit_bias={"1021": 100}, max_tokens=2, extra_body=extra)
    same(content(answer), "<|endoftext|>" * 2)


@check("vllm: add_generation_prompt false leaves the answer's opening out")
def _():
    plain = chat(max_tokens=1).usage.prompt_tokens
    without = chat(max_tokens=1, extra_body={"add_generation_prompt": False}).usage.prompt_tokens
    assert without < plain


# --- completions


@check("completions: a whole answer has every field")
def _():
    answer = complete()
    same((answer.object, answer.model, len(answer.choices)), ("text_completion", MODEL, 1))
    assert answer.id.startswith("cmpl-") and answer.created > 1_600_000_000
    choice = answer.choices[0]
    same((choice.index, choice.logprobs), (0, None))
    assert choice.text and choice.finish_reason in ("stop", "length")
    same(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)


@check("completions: sixteen tokens where nothing is said")
def _():
    answer = client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True})
    same((answer.usage.completion_tokens, answer.choices[0].finish_reason), (16, "length"))


@check("completions: several prompts have their answers in order")
def _():
    prompts = [PROMPT, "What is", "Tom has"]
    alone = [complete(prompt).choices[0].text for prompt in prompts]
    same([choice.text for choice in complete(prompts).choices], alone)


@check("completions: a prompt of token ids is that text")
def _():
    ids = complete(extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    same(complete(ids).choices[0].text, complete().choices[0].text)


@check("completions: lists of token ids are several prompts")
def _():
    ids = complete(extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    same([choice.text for choice in complete([ids, ids]).choices], [complete().choices[0].text] * 2)


@check("completions: n for each of several prompts")
def _():
    answer = complete([PROMPT, "What is"], n=2, temperature=1, seed=1, max_tokens=3, extra_body={"ignore_eos": True})
    same([choice.index for choice in answer.choices], [0, 1, 2, 3])
    same(answer.usage.completion_tokens, 12)


@check("completions: logprobs name tokens, their likelihood and their places")
def _():
    answer = complete(logprobs=3, max_tokens=6)
    scores = answer.choices[0].logprobs
    lengths = [len(scores.tokens), len(scores.token_logprobs), len(scores.top_logprobs), len(scores.text_offset)]
    same(lengths, [answer.usage.completion_tokens] * 4)
    assert "".join(scores.tokens).startswith(answer.choices[0].text)
    same(scores.text_offset[0], 0)
    same(scores.text_offset[-1], sum(map(len, scores.tokens[:-1])))
    assert all(score <= 0 for score in scores.token_logprobs)
    assert all(1 <= len(top) <= 3 and token in top for token, top in zip(scores.tokens, scores.top_logprobs))


@check("completions: logprobs 0 has the drawn token alone")
def _():
    scores = complete(logprobs=0, max_tokens=2).choices[0].logprobs
    same((len(scores.tokens), len(scores.token_logprobs)), (2, 2))


@check("completions: stop as string and as list")
def _():
    whole = complete(max_tokens=30).choices[0].text
    stop = whole[8:12]
    for given in (stop, ["never said", stop]):
        answer = complete(max_tokens=30, stop=given).choices[0]
        same((answer.text, answer.finish_reason), (whole[:whole.index(stop)], "stop"))


@check("completions: a seed repeats what it drew")
def _():
    drawings = [complete(temperature=1.2, seed=seed).choices[0].text for seed in (3, 3, 4, 5)]
    same(drawings[0], drawings[1])
    assert len(set(drawings)) > 1


@check("completions: penalties and biases are taken")
def _():
    given = {"logit_bias": {"370": 100, "371": 90}, "max_tokens": 40, "frequency_penalty": 2, "presence_penalty": 0.5}
    same({370, 371} - set(drawn(complete(**given, extra_body={"return_token_ids": True, "ignore_eos": True}))), set())


@check("completions: a stream is the whole answer")
def _():
    chunks = list(complete(stream=True))
    same("".join(chunk.choices[0].text for chunk in chunks), complete().choices[0].text)
    same({(chunk.id, chunk.object) for chunk in chunks}, {(chunks[0].id, "text_completion")})
    assert chunks[-1].choices[0].finish_reason


@check("completions: a stream with usage at its end")
def _():
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    same((chunks[-1].choices, chunks[-1].usage.completion_tokens), ([], complete().usage.completion_tokens))
    assert all(chunk.usage is None for chunk in chunks[:-1])


@check("completions: a stream of several prompts")
def _():
    prompts = [PROMPT, "What is"]
    chunks = list(complete(prompts, stream=True))
    texts = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in range(2)]
    same(texts, [choice.text for choice in complete(prompts).choices])


@check("completions: an empty suffix and best_of 1 say nothing")
def _():
    same(complete(suffix="", best_of=1).choices[0].text, complete().choices[0].text)


@check("completions: the likeliest of best_of, and the prompt's echo")
def _():
    answer = complete(n=1, best_of=3, temperature=1, seed=5)
    same(len(answer.choices), 1)
    assert answer.usage.completion_tokens > len(answer.choices[0].text) / 8
    same(complete(echo=True).choices[0].text, PROMPT + complete().choices[0].text)
    same(complete(echo=True, max_tokens=0).choices[0].text, PROMPT)


@check("completions: echo with logprobs scores the prompt as drawing it would")
def _():
    answer = complete(echo=True, logprobs=2, max_tokens=0)
    scores = answer.choices[0].logprobs
    same(("".join(scores.tokens), answer.usage.completion_tokens), (PROMPT, 0))
    same((scores.token_logprobs[0], scores.top_logprobs[0]), (None, None))
    assert all(score <= 0 for score in scores.token_logprobs[1:])
    drawn = complete(logprobs=2, max_tokens=6).choices[0]
    both = complete(echo=True, logprobs=2, max_tokens=6).choices[0].logprobs
    prompt = len(scores.tokens)
    same(both.token_logprobs, scores.token_logprobs + drawn.logprobs.token_logprobs)
    again = complete(prompt=PROMPT + drawn.text, echo=True, logprobs=2, max_tokens=0).choices[0].logprobs
    if again.tokens == both.tokens:
        same(again.token_logprobs[prompt:], drawn.logprobs.token_logprobs)


def run_async(function):
    async def with_client():
        async with async_client() as client:
            await function(client)

    asyncio.run(with_client())


import suite_faults  # noqa: E402,F401 (its checks come last)


def main():
    print("openai", openai.__version__, "on Python", sys.version.split()[0])
    failed = []
    for name, function in CHECKS + [(name, lambda f=f: run_async(f)) for name, f in ASYNC_CHECKS]:
        try:
            function()
        except Exception:  # every check is run, whatever became of the others
            failed.append(name)
            print(f"FAILED: {name}", file=sys.stderr)
            traceback.print_exc()
    total = len(CHECKS) + len(ASYNC_CHECKS)
    print(f"{total - len(failed)} of {total} checks passed with {cluster.requests} requests")
    if failed:
        sys.exit("FAILED: " + "; ".join(failed))


main()
