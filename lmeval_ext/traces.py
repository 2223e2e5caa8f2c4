"""Trace files: a model's own answers to prompts, as token ids. `lmeval_ext.answers` writes one, `own_answers` reads it.

A file is one JSON object:

    format            "lmeval-ext traces"
    version           1
    model             label, engine, engine_version, dtype, device, checkpoint, weights_sha256, arguments: what answered
    tokenizer         name, and sha256 of the ids of a fixed text (`tokens.tokenizer_sha256`)
    chat_template     sha256 of the template that the prompts were put into; null if none was applied
    generation        max_tokens, temperature, seed
    rows              one object per answer: name, kind, prompt (text), prompt_ids, response_ids (the thinking included,
                      and the token that ended the answer, if one did), response (text, for readers)

The trace of ExLlamaV3's eval/qbench_prompts.py, which its qbench reads as `test_trace`, is read too: `rows` with
`input_ids` and `response_ids`. It says neither how the answers were sampled nor with which tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError

FORMAT = "lmeval-ext traces"
VERSION = 1
QBENCH = "qbench test_trace"


@dataclass(frozen=True)
class TraceRow:
    """One prompt and its answer, both at least one token."""

    name: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Trace:
    """The content of a trace file.

    format: `FORMAT` or `QBENCH`. sha256: of the file. model: the label of the model that answered. tokenizer_sha256:
    None if the file does not have it. greedy: whether each token was the likeliest; None if the file does not say.
    """

    path: Path
    format: str
    sha256: str
    model: str | None
    tokenizer: str | None
    tokenizer_sha256: str | None
    greedy: bool | None
    rows: tuple[TraceRow, ...]


def read_trace(path: str | Path) -> Trace:
    """Read a trace file of either format. Raises UserError, one line, for a file that is neither, or is damaged."""
    file = Path(path).expanduser()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"trace={str(path)!r} cannot be read ({error.strerror or error}); make one with `compare traces`"
        ) from error
    content = _parsed(data)
    rows = content.get("rows")
    if content.get("format") == FORMAT and content.get("version") != VERSION:
        raise UserError(
            f"trace={str(path)!r} has version {content.get('version')!r}, this lmeval-ext reads {VERSION}; make it "
            "again with `compare traces`"
        )
    own = content.get("format") == FORMAT
    if not isinstance(rows, list) or not rows or not (own or _is_qbench(rows)):
        raise UserError(
            f"trace={str(path)!r} is neither a trace of `compare traces` nor a qbench test_trace: expected a JSON "
            "object with rows of prompt_ids (or input_ids) and response_ids"
        )
    digest = hashlib.sha256(data).hexdigest()
    prompt = "prompt_ids" if own else "input_ids"
    read = tuple(_row(row, number, prompt, str(path)) for number, row in enumerate(rows))
    if not own:
        model = content.get("model")
        return Trace(file, QBENCH, digest, model if isinstance(model, str) else None, None, None, None, read)
    model, tokenizer, generation = (_mapping(content, name) for name in ("model", "tokenizer", "generation"))
    temperature = generation.get("temperature")
    return Trace(
        path=file,
        format=FORMAT,
        sha256=digest,
        model=model.get("label"),
        tokenizer=tokenizer.get("name"),
        tokenizer_sha256=tokenizer.get("sha256"),
        greedy=None if temperature is None else temperature == 0,
        rows=read,
    )


def trace_bytes(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of a trace file, one line per row. header: the fields but format, version and rows."""
    fields = {"format": FORMAT, "version": VERSION, **header}
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    listed = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return ("{\n" + ",\n".join(lines) + ',\n"rows": [\n' + listed + "\n]\n}\n").encode()


def _parsed(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; an empty one if it is anything else."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_qbench(rows: Sequence[Any]) -> bool:
    return isinstance(rows[0], dict) and {"input_ids", "response_ids"} <= rows[0].keys()


def _row(row: Any, number: int, prompt: str, path: str) -> TraceRow:
    """One row. Raises UserError if it lacks token ids."""
    fields = row if isinstance(row, dict) else {}
    ids = {name: fields.get(name) for name in (prompt, "response_ids")}
    for name, value in ids.items():
        if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
            raise UserError(f"trace={path!r}, row {number}: {name} is not a list of token ids; make the file again")
    default = f"conversation {fields.get('conversation')}, turn {fields.get('turn')}" if "turn" in fields else number
    return TraceRow(str(fields.get("name") or default), *(tuple(map(int, value or ())) for value in ids.values()))


def _mapping(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}
