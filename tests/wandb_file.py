"""Read what an offline Weights & Biases run wrote: a LevelDB log of protobuf records."""

import json
import struct

BLOCK = 32768  # a record is split where it crosses a block; a chunk has a 7-byte header
FULL, FIRST, _, LAST = 1, 2, 3, 4


def payloads(data):
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # too small for a header: padding
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + size]
        position += 7 + size
        record = chunk if kind in (FULL, FIRST) else record + chunk
        if kind in (FULL, LAST):
            yield record


def records(path):
    from wandb.proto.wandb_internal_pb2 import Record

    for payload in payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(payload)
        yield record


def group(path):
    """The group that the run belongs to."""
    (name,) = {record.run.run_group for record in records(path) if record.HasField("run")}
    return name


def read(path):
    """The run's configuration, and its history as one dict a row."""
    config, history = {}, []
    for record in records(path):
        if record.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            row = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            history.append({key: json.loads(value) for key, value in row.items()})
    return config, history
