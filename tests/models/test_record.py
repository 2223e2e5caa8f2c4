"""The block that describes a model in a result file."""

from __future__ import annotations

import json
from enum import Enum

import numpy as np
import torch

from lmeval_ext.models.record import Quantization, result_block


class Method(str, Enum):
    AWQ = "awq"


def test_result_block_prints_enums_by_value_and_names_unknown_objects() -> None:
    facts = Quantization(
        "label", "engine", torch.__version__, family=Method.AWQ, kernel={"a": (Method.AWQ,)},  # type: ignore[arg-type]
        layer_bpw=np.float32(4.5), weight_bytes=np.int64(7), dtype=torch.float16, notes=[Method.AWQ, "note"],  # type: ignore[arg-type]
    )  # fmt: skip
    block = result_block(facts)
    assert (block["family"], block["kernel"], block["engine_version"]) == ("awq", {"a": ["awq"]}, torch.__version__)
    assert (block["layer_bpw"], block["weight_bytes"], block["dtype"]) == (4.5, 7, None)
    assert block["notes"] == ["awq", "note", "dtype unknown: the engine gave an object of type dtype"]
    assert json.loads(json.dumps(block)) == block
    assert all(type(value) is not Method for value in block.values())
