"""What an application sees when something is wrong: errors, faults, and very much at once."""

import asyncio
import json
import socket

import openai

from cluster import *


# --- errors


@check("errors: an unknown model is not found")
def _():
    for call in (chat, complete):
        error = refused(openai.NotFoundError, call, model="other")
        same((error.status_code, error.code, error.param), (404, "model_not_found", "model"))


@check("errors: temperature out of range")
def _():
    wrong(chat, "invalid_value", "temperature", temperature=2.5)


@check("errors: no messages")
def _():
    wrong(chat, "invalid_value", "messages", messages=[])


@check("errors: a role that nobody has")
def _():
    wrong(chat, "invalid_value", "messages[0].role", messages=[{"role": "cook", "content": "hi"}])


@check("errors: more than the context has")
def _():
    wrong(chat, "context_length_exceeded", "messages", max_tokens=10**6)
    wrong(complete, "context_length_exceeded", "prompt", prompt=[1] * 2048)


@check("errors: tools are not supported")
def _():
    wrong(chat, "unsupported_parameter", "tools", tools=[TOOL])


@check("errors: a JSON schema is not supported")
def _():
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}
    wrong(chat, "unsupported_parameter", "response_format", response_format=schema)


@check("errors: an image is not supported")
def _():
    wrong(chat, "unsupported_parameter", "messages[0].content[0]", messages=[{"role": "user", "content": [IMAGE]}])


@check("errors: too many choices")
def _():
    wrong(chat, "invalid_value", "n", n=1000)


@check("errors: a bias for no token")
def _():
    wrong(chat, "invalid_value", "logit_bias", logit_bias={"99999": 1})


@check("errors: top_logprobs without logprobs")
def _():
    wrong(chat, "invalid_value", "top_logprobs", top_logprobs=2)


@check("errors: too many stop strings")
def _():
    wrong(chat, "invalid_value", "stop", stop=["a", "b", "c", "d", "e"])


@check("errors: usage of a stream that is none")
def _():
    wrong(chat, "invalid_value", "stream_options", stream_options={"include_usage": True})


@check("errors: a prompt of the wrong kind")
def _():
    wrong(complete, "invalid_value", "prompt", prompt=7)
    wrong(complete, "invalid_value", "prompt", prompt=[99999])


@check("errors: a suffix is not supported")
def _():
    wrong(complete, "unsupported_parameter", "suffix", suffix="x")


@check("errors: a path that is not there")
def _():
    error = refused(openai.NotFoundError, client.images.generate, model=MODEL, prompt="x")
    same((error.status_code, error.code), (404, "not_found"))


# --- faults of the network and of the cluster


@check("faults: a time-out is the package's own error")
def _():
    hasty = client.with_options(timeout=0.05)
    error = refused(openai.APITimeoutError, hasty.chat.completions.create, model=MODEL, messages=STORY,
                    max_tokens=1500, extra_body={"ignore_eos": True})
    assert isinstance(error, openai.APIConnectionError)


@check("faults: a connection that fails")
def _():
    with socket.socket() as unused:
        # Bound and not listening: nobody else gets the port while this is tried.
        unused.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        refused(openai.APIConnectionError, sync_client(base_url=base).models.list)


@check("faults: no worker is a 503 that says when to try again")
def _():
    cordon(True)
    try:
        for stream in (False, True):
            error = refused(openai.InternalServerError, chat, stream=stream)
            same((error.status_code, error.code, error.type), (503, "no_worker", "server_error"))
            same(error.response.headers["retry-after"], "1")
    finally:
        cordon(False)


@check("faults: a 503 is tried again")
def _():
    statuses = []

    def on_response(response):
        statuses.append(response.status_code)
        if response.status_code == 503:
            cordon(False)

    cordon(True)
    try:
        again = sync_client(max_retries=2, on_response=[on_response])
        answer = again.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    finally:
        cordon(False)
    same(statuses, [503, 200])
    same(content(answer), content(chat()))


@check("faults: a 400 is not tried again")
def _():
    statuses = []
    again = sync_client(max_retries=2, on_response=[lambda response: statuses.append(response.status_code)])
    refused(openai.BadRequestError, again.chat.completions.create, model=MODEL, messages=[])
    same(statuses, [400])


# --- many at once: the asynchronous client


@check("async: models, chat and completions")
async def _(client):
    same([model.id async for model in client.models.list()], [MODEL])
    answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    same(content(answer), content(chat()))
    answer = await client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12)
    same(answer.choices[0].text, complete().choices[0].text)


@check("async: a stream of chunks")
async def _(client):
    stream = await client.chat.completions.create(model=MODEL, messages=STORY, temperature=0, max_tokens=24, stream=True)
    same(said([chunk async for chunk in stream]), content(chat(STORY)))


@check("async: a stream of completions")
async def _(client):
    stream = await client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12, stream=True)
    same("".join([chunk.choices[0].text async for chunk in stream]), complete().choices[0].text)


@check("async: the package's helper puts the chunks together")
async def _(client):
    async with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24) as stream:
        same(content(await stream.get_final_completion()), content(chat()))


@check("async: raw and streaming responses")
async def _(client):
    given = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    raw = await client.chat.completions.with_raw_response.create(**given)
    same((raw.status_code, content(raw.parse())), (200, content(chat())))
    async with client.chat.completions.with_streaming_response.create(**given) as response:
        same(content(await response.parse()), content(chat()))


@check("async: errors")
async def _(client):
    try:
        await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=9)
    except openai.BadRequestError as error:
        same((error.code, error.param), ("invalid_value", "temperature"))
    else:
        raise AssertionError("not refused")


@check("async: a time-out")
async def _(client):
    hasty = client.with_options(timeout=0.05)
    try:
        await hasty.chat.completions.create(model=MODEL, messages=STORY, max_tokens=1500,
                                            extra_body={"ignore_eos": True})
    except openai.APITimeoutError:
        return
    raise AssertionError("no time-out")


@check("async: a client may leave early and come back")
async def _(client):
    stream = await client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=1500, stream=True,
                                                  extra_body={"ignore_eos": True})
    async with stream:
        await anext(aiter(stream))
    assert await client.models.retrieve(MODEL)


@check("many: sixteen at once answer as one does")
def _():
    async def all_at_once():
        async with async_client() as many:
            one = many.chat.completions.create
            given = {"model": MODEL, "messages": STORY, "temperature": 1, "max_tokens": 12}
            return await asyncio.gather(*(one(**given, seed=seed % 4) for seed in range(16)))

    answers = [content(answer) for answer in asyncio.run(all_at_once())]
    alone = [content(chat(STORY, temperature=1, max_tokens=12, seed=seed)) for seed in range(4)]
    same(answers, alone * 4)


@check("many: sixteen streams at once are each whole")
def _():
    async def one(many, seed):
        stream = await many.chat.completions.create(model=MODEL, messages=STORY, temperature=1, max_tokens=12,
                                                    seed=seed % 4, stream=True)
        return said([chunk async for chunk in stream])

    async def all_at_once():
        async with async_client() as many:
            return await asyncio.gather(*(one(many, seed) for seed in range(16)))

    alone = [content(chat(STORY, temperature=1, max_tokens=12, seed=seed)) for seed in range(4)]
    same(asyncio.run(all_at_once()), alone * 4)
