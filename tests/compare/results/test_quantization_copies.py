"""`Quantization` exists twice on purpose, as `compare` does not import `lmeval_ext`: both must mean the same."""

from __future__ import annotations

import json
import types
from dataclasses import asdict, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from compare.results import records
from compare.results.reading import read_file
from lmeval_ext.models import record
from lmeval_ext.storage import kv_cache
from tests.compare.conftest import result

# Fields of one copy only, with the reason
ONLY_WRITTEN = {
    "label": "is the label of the record (Record.label)",
    "bos": "is a setting of the comparison (ProtocolRecord.harness)",
    "execution": "is not shown: eager and compiled runs round differently, as two batch sizes do",
    "weight_vram_gb": "is not shown; the sizes of the weights come from the checkpoint",
}
ONLY_READ = {"known": "tells a file with the block from one without"}


def _type(hint: Any) -> Any:
    """The type without None, which the reader writes as an empty string; a list and a tuple count alike."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) in (list, tuple):
        return (tuple, get_args(hint)[0])
    return get_origin(hint) or hint


def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: _type(hints[field.name]) for field in fields(cls)}


def test_fields_agree_in_name_and_type():
    written, read = _types(record.Quantization), _types(records.Quantization)
    assert written.keys() - read.keys() == ONLY_WRITTEN.keys()
    assert read.keys() - written.keys() == ONLY_READ.keys()
    shared = written.keys() & read.keys()
    assert (written.pop("kv_cache"), read.pop("kv_cache")) == (dict, records.KVCacheSize)  # compared below
    shared.remove("kv_cache")
    assert {name: written[name] for name in shared} == {name: read[name] for name in shared}


def test_what_is_written_in_a_field_is_read_from_it(tmp_path):
    values: dict[str, Any] = {}
    for number, (name, kind) in enumerate(_types(record.Quantization).items(), 3):
        example = {str: f"{name} text", float: number + 0.5, int: number, dict: {}, (tuple, str): [f"{name} note"]}
        values[name] = example[kind]
    cache = kv_cache.KVCache(groups=((96, None), (64, 512)), state_bytes=7, exact=False)
    values["kv_cache"] = cache.to_dict()
    content = result()
    content["config"]["quantization"] = asdict(record.Quantization(**values))
    file = tmp_path / "results_2026.json"
    file.write_text(json.dumps(content))
    quantization = read_file(file)[0].quantization
    assert quantization.kv_cache == records.KVCacheSize(cache.groups, cache.state_bytes, not cache.exact)
    for name in values.keys() - ONLY_WRITTEN.keys() - {"kv_cache"}:
        value = getattr(quantization, name)
        assert (list(value) if isinstance(value, tuple) else value) == values[name], name
    assert quantization.known
