"""What an application developer does with the openai package, against the cluster at argv[1]."""

import sys

import openai

base, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base, api_key="unused", max_retries=0, timeout=60)
print("openai", openai.__version__)

assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

messages = [{"role": "user", "content": "What is 2+2?"}]
whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_completion_tokens=20)
assert whole.choices[0].message.role == "assistant"
assert whole.choices[0].finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert whole._request_id

stream = client.chat.completions.create(
    model=model, messages=messages, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True})
text, usage, reasons = "", None, []
for chunk in stream:
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    usage = chunk.usage or usage
assert text == whole.choices[0].message.content, (text, whole)
assert usage == whole.usage and reasons == [whole.choices[0].finish_reason]

scored = client.chat.completions.create(
    model=model, messages=messages, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2)
content = scored.choices[0].logprobs.content
assert content and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)

first = client.completions.create(model=model, prompt="Once there was", max_tokens=8, temperature=0.8, seed=3)
again = client.completions.create(model=model, prompt="Once there was", max_tokens=8, temperature=0.8, seed=3)
assert first.choices[0].text == again.choices[0].text
pieces = client.completions.create(model=model, prompt="Once there was", max_tokens=8, temperature=0.8, seed=3, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == first.choices[0].text
several = client.completions.create(model=model, prompt=["One", "Two"], n=2, max_tokens=2)
assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def error_of(kind, **arguments):
    try:
        client.chat.completions.create(**{"model": model, "messages": messages, **arguments})
    except kind as error:
        return error
    raise AssertionError(f"{arguments} is not refused")


assert error_of(openai.NotFoundError, model="other").code == "model_not_found"
assert error_of(openai.BadRequestError, temperature=9).param == "temperature"
assert error_of(openai.BadRequestError, messages=[]).param == "messages"
assert error_of(openai.BadRequestError, max_tokens=10**6).code == "context_length_exceeded"
tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
assert error_of(openai.BadRequestError, tools=tools).code == "unsupported_parameter"

# A client that leaves in the middle of a stream.
with client.chat.completions.create(model=model, messages=messages, max_tokens=500, stream=True) as left:
    next(iter(left))
print("all is well")
