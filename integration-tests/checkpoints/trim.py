#!/usr/bin/env python3
"""Cut a reference model down to what is committed here, and derive copies in other element types and in shards.

  trim.py SOURCE NAME        SOURCE is a folder written by make_reference_models.py; writes ./NAME
  trim.py --variants NAME    writes ./NAME-f16, ./NAME-f32 and ./NAME-sharded from ./NAME

Of reference/tensors.safetensors only CASE/logits stay, the last 24 rows of each case (all, where it has fewer).
Needs nothing but Python.
"""

import json
import os
import shutil
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROWS = 24
SHARDS = 3


def read(path):
    """name -> (dtype, shape, bytes), in file order."""
    with open(path, "rb") as f:
        data = f.read()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length:]
    return {name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])])
            for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"])}


def write(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


def folder(name):
    path = os.path.join(HERE, name)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(os.path.join(path, "reference"))
    return path


def last_rows(dtype, shape, data):
    rows, columns = shape
    kept = min(rows, ROWS)
    return dtype, [kept, columns], data[len(data) // rows * (rows - kept):]


def trim(source, name):
    target = folder(name)
    for entry in sorted(os.listdir(source)):
        if os.path.isfile(os.path.join(source, entry)):
            shutil.copyfile(os.path.join(source, entry), os.path.join(target, entry))
    shutil.copyfile(os.path.join(source, "reference", "cases.json"), os.path.join(target, "reference", "cases.json"))
    tensors = read(os.path.join(source, "reference", "tensors.safetensors"))
    logits = {n: last_rows(*t) for n, t in sorted(tensors.items()) if n.endswith("/logits")}
    write(os.path.join(target, "reference", "tensors.safetensors"), logits)


def floats(bf16):
    """The values of bf16 bytes."""
    count = len(bf16) // 2
    halves = struct.unpack(f"<{count}H", bf16)
    return struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(h << 16 for h in halves)))


def to_f32(shape, bf16):
    values = floats(bf16)
    return "F32", shape, struct.pack(f"<{len(values)}f", *values)


def to_f16(shape, bf16):
    values = floats(bf16)
    data = struct.pack(f"<{len(values)}e", *values)
    for value, half in zip(values, struct.unpack(f"<{len(values)}e", data)):
        # Below 2^-17 a bf16 value may fall between two half-precision ones, at most 2^-25 from the nearer; the
        # reference logits do not feel that. Everything else must be exact.
        assert value == half or (abs(value) < 2.0**-17 and abs(value - half) <= 2.0**-25), value
    return "F16", shape, data


def derive(name, suffix, dtype, write_weights):
    source, target = os.path.join(HERE, name), folder(name + suffix)
    for entry in os.listdir(source):
        if os.path.isfile(os.path.join(source, entry)) and entry != "model.safetensors":
            shutil.copyfile(os.path.join(source, entry), os.path.join(target, entry))
    for entry in os.listdir(os.path.join(source, "reference")):
        shutil.copyfile(os.path.join(source, "reference", entry), os.path.join(target, "reference", entry))
    for config, key in (("config.json", "dtype"), ("config.legacy.json", "torch_dtype")):
        path = os.path.join(target, config)
        with open(path) as f:
            facts = json.load(f)
        assert facts[key] == "bfloat16", facts[key]
        facts[key] = dtype
        with open(path, "w") as f:
            json.dump(facts, f, indent=2)
    write_weights(target, read(os.path.join(source, "model.safetensors")))


def write_single(convert):
    def write_weights(target, tensors):
        converted = {name: convert(shape, data) for name, (_, shape, data) in tensors.items()}
        write(os.path.join(target, "model.safetensors"), converted)
    return write_weights


def write_shards(target, tensors):
    names, where = list(tensors), {}
    for number in range(SHARDS):
        part = names[len(names) * number // SHARDS:len(names) * (number + 1) // SHARDS]
        shard = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        write(os.path.join(target, shard), {name: tensors[name] for name in part})
        where.update({name: shard for name in part})
    total = sum(len(data) for _, _, data in tensors.values())
    with open(os.path.join(target, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, f, indent=2)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    if sys.argv[1] != "--variants":
        return trim(sys.argv[1], sys.argv[2])
    name = sys.argv[2]
    derive(name, "-f16", "float16", write_single(to_f16))
    derive(name, "-f32", "float32", write_single(to_f32))
    derive(name, "-sharded", "bfloat16", write_shards)


if __name__ == "__main__":
    main()
