"""The cluster under test, and what the checks of the suites have in common."""

import json
import sys
import urllib.request

import openai


BASE, ADMIN = sys.argv[1], sys.argv[2]
TIMEOUT = 120

requests = 0


def count(_request):
    global requests
    requests += 1


async def count_async(request):
    count(request)


def sync_client(**options):
    hooks = {"request": [count], "response": options.pop("on_response", [])}
    http = openai.DefaultHttpxClient(event_hooks=hooks)
    given = {"base_url": BASE, "api_key": "unused", "max_retries": 0, "timeout": TIMEOUT, "http_client": http}
    return openai.OpenAI(**{**given, **options})


def async_client():
    http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [count_async]})
    return openai.AsyncOpenAI(base_url=BASE, api_key="unused", max_retries=0, timeout=TIMEOUT, http_client=http)


client = sync_client()
MODEL = client.models.list().data[0].id
QUESTION = [{"role": "user", "content": "What is 2+2?"}]
STORY = [{"role": "user", "content": "Tell me a story."}]
PROMPT = "Once there was"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

CHECKS, ASYNC_CHECKS = [], []


def check(name):
    return lambda function: (ASYNC_CHECKS if name.startswith("async: ") else CHECKS).append((name, function))


def chat(messages=QUESTION, **given):
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "temperature": 0,
                                             "max_tokens": 24, **given})


def complete(prompt=PROMPT, **given):
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12,
                                        **given})


def content(answer, choice=0):
    return answer.choices[choice].message.content


def said(stream, choice=0):
    """The text of one choice of a stream of chat chunks."""
    return "".join(c.delta.content or "" for chunk in stream for c in chunk.choices if c.index == choice)


def drawn(answer):
    """The token ids of an answer that was asked for them."""
    return answer.choices[0].token_ids


def same(a, b):
    assert a == b, f"{a!r} is not {b!r}"


def greedy_token():
    """The token that a greedy answer to the question begins with."""
    return drawn(chat(max_tokens=1, extra_body={"return_token_ids": True}))[0]


def refused(kind, call, **given):
    try:
        call(**given)
    except openai.APIError as error:
        assert type(error) is kind, f"{type(error)} is not {kind}: {error}"
        return error
    raise AssertionError(f"{given} is not refused")


def wrong(call, code, param, **given):
    error = refused(openai.BadRequestError, call, **given)
    same((error.status_code, error.code, error.param), (400, code, param))
    same(error.type, "invalid_request_error")
    assert error.body["message"] and error.request_id


def admin(method, path):
    request = urllib.request.Request(ADMIN + path, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


def workers():
    with urllib.request.urlopen(f"{ADMIN}/admin/cluster", timeout=30) as response:
        return [worker["id"] for worker in json.load(response)["workers"]]


def cordon(wanted):
    for worker in workers():
        admin("POST" if wanted else "DELETE", f"/admin/workers/{worker}/cordon")
