"""What schemathesis does besides: bounds cases, counts answers, and reads event streams.

The script `schema.py` names this file to schemathesis.
"""

import json
import math
import os

import jsonschema_rs
import schemathesis

with open(os.environ["TANDEM_SCHEMA"], encoding="utf-8") as file:
    DOCUMENT = json.load(file)

SUPPORTED = os.environ["TANDEM_SUPPORTED"] == "True"

# A case shows what it shows in a few tokens.
TOKENS_MAX = 6
CHOICES_MAX = 3


def validator(name):
    return jsonschema_rs.Draft202012Validator({**DOCUMENT, "$ref": f"#/components/schemas/{name}"})


EVENTS = {
    "/chat/completions": validator("CreateChatCompletionStreamResponse"),
    "/completions": validator("CompletionEvent"),
}


@schemathesis.hook
def map_body(context, body):
    """Bounds the work; values that are out of range, and so refused, stay as they are."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if SUPPORTED:
        # What a schema cannot say: these two go together with others.
        if body.get("stream") is not True:
            body.pop("stream_options", None)
        if body.get("top_logprobs"):
            body["logprobs"] = True
    for name, bound, most in (("max_tokens", TOKENS_MAX, math.inf), ("max_completion_tokens", TOKENS_MAX, math.inf),
                              ("n", CHOICES_MAX, 128)):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and bound < value <= most:
            body[name] = bound
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = TOKENS_MAX
    return body


def is_events(response):
    return (response.headers.get("content-type") or [""])[0].startswith("text/event-stream")


@schemathesis.hook
def after_call(context, case, response):
    with open(os.environ["TANDEM_ANSWERS"], "a", encoding="ascii") as file:
        manner = " in events" if is_events(response) else ""
        print(f"{case.method} {case.operation.path} {response.status_code}{manner}", file=file)


@schemathesis.check
def events_conform(ctx, response, case):
    """Every event of a stream is as the document has it, and the last says that it is over."""
    if not is_events(response):
        return
    assert response.status_code == 200, "an event stream is an answer"
    events = [event for event in response.content.decode("utf-8").split("\n\n") if event]
    assert events and events[-1] == "data: [DONE]", f"the stream ends with {events[-1:]}"
    for event in events[:-1]:
        assert event.startswith("data: "), f"{event!r} is no event with data"
        chunk = json.loads(event.removeprefix("data: "))
        for error in EVENTS[case.operation.path].iter_errors(chunk):
            raise AssertionError(f"{error.message} in {chunk}")
