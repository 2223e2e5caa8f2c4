"""From a ``results_*.json`` to records. Anything may stand in such a file; what does not fit is said by name.

The file format is the harness' own (``EvaluationTracker.save_results_aggregated``), plus ``config.quantization``
and the ``configs.TASK.metadata`` of this project's perplexity tasks.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from compare.discover import Problem, find_result_files
from compare.families import canonical_family
from compare.presentation import Relabelling
from compare.provenance import Run
from compare.records import Metric, Protocol, Quantization, Record
from compare.stock import stock_quantization
from compare.text import clean, split_colour_tag

# A harness result file is some 10 kB a task; samples stand in files of their own.
MAX_BYTES = 64 * 1024 * 1024
_NOT_METRICS = {"alias", "name", "sample_len", "sample_count", "samples"}


@dataclass
class Reading:
    """What was found below the paths given."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_results(paths: Iterable[Path]) -> Reading:
    """Every record below `paths`; files that hold none are in `problems`, with the reason."""
    files, problems = find_result_files(paths)
    reading = Reading(problems=problems)
    relabelled = Relabelling()
    for file in files:
        try:
            reading.records.extend(relabelled(file, read_file(file)))
        except ValueError as error:
            reading.problems.append(Problem(file, str(error)))
        except OSError as error:
            reading.problems.append(Problem(file, error.strerror or str(error)))
    return reading


def read_file(path: Path) -> list[Record]:
    """The records of one file. ValueError (what is wrong) or OSError (why it cannot be read) otherwise."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"has {status.st_size:,} bytes, more than any result file")
    content = _mapping_or_none(_parse(path.read_bytes()))
    if content is None or not isinstance(content.get("results"), dict):
        raise ValueError('is not a harness result file (expected an object with "results")')
    records = [
        record
        for task, figures in content["results"].items()
        if isinstance(figures, dict) and (record := _record(path, content, task, figures, status.st_mtime))
    ]
    if not records:
        raise ValueError("holds no task with a figure")
    return records


def _parse(data: bytes) -> object:
    if not data.strip():
        raise ValueError("is empty")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("is nested too deeply for a result file") from None
    except UnicodeDecodeError:
        raise ValueError("is not text (not UTF-8)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON, or is cut off (line {error.lineno}: {error.msg})") from None
    except ValueError as error:
        raise ValueError(f"is not usable JSON ({clean(str(error))})") from None


def _record(path: Path, content: dict[str, Any], task: str, figures: dict[str, Any], modified: float) -> Record | None:
    metrics = _metrics(figures, _mapping(_mapping(content, "higher_is_better"), task))
    if not metrics:
        return None
    config = _mapping(content, "config")
    model = _text(config.get("model"))
    arguments = model_arguments(config.get("model_args"))
    checkpoint = _checkpoint_name(arguments)
    quantization = _quantization(config, arguments, checkpoint)
    raw_label = _mapping(config, "quantization").get("label")
    stock_name = " ".join(part for part in (model, checkpoint) if part) or _text(content.get("model_name"))
    label, colour = split_colour_tag(_text(raw_label) or stock_name or path.stem)
    return Record(
        label=label or stock_name or path.stem,
        colour=colour,
        task=clean(task),
        metrics=metrics,
        quantization=quantization,
        protocol=_protocol(content, task),
        model=model,
        checkpoint=checkpoint,
        run=Run.of(content, task),
        date=_number(content.get("date")) or modified,
        file=path,
    )


def _metrics(figures: dict[str, Any], directions: dict[str, Any]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for key, value in figures.items():
        name, _, filter_name = key.partition(",")
        if name in _NOT_METRICS or name.endswith("_stderr") or not _is_figure(value):
            continue
        stderr = _number(figures.get(f"{name}_stderr,{filter_name}" if filter_name else f"{name}_stderr"))
        direction = directions.get(name)
        metrics[clean(key)] = Metric(
            value=_number(value),
            stderr=stderr if stderr is None or stderr >= 0 else None,
            higher_is_better=direction if isinstance(direction, bool) else None,
        )
    return metrics


def _is_figure(value: object) -> bool:
    """Numbers, and null, which stands for a number that could not be formed."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _quantization(config: dict[str, Any], arguments: dict[str, str], checkpoint: str) -> Quantization:
    said = _mapping_or_none(config.get("quantization"))
    if said is None:
        return stock_quantization(config, arguments, checkpoint)
    notes = said.get("notes")
    return Quantization(
        known=True,
        family=canonical_family(_text(said.get("family")) or "unknown"),
        scheme=_text(said.get("scheme")),
        layer_bpw=_positive(said.get("layer_bpw")),
        head_bpw=_positive(said.get("head_bpw")),
        vram_gb=_positive(said.get("vram_gb")),
        file_bpw=_positive(said.get("file_bpw")),
        weight_bytes=_count(said.get("weight_bytes")),
        layer_parameters=_count(said.get("layer_parameters")),
        kv_bytes_per_token=_count(said.get("kv_bytes_per_token")),
        kv_cache_dtype=_text(said.get("kv_cache_dtype")),
        engine=_text(said.get("engine")),
        engine_version=_text(said.get("engine_version")),
        kernel=_text(said.get("kernel")) or None,
        dtype=_text(said.get("dtype")),
        device=_text(said.get("device")),
        revision=_text(said.get("revision")),
        scoring=_text(said.get("scoring")),
        tokens_per_second=_positive(said.get("tokens_per_second")),
        peak_vram_gb=_positive(said.get("peak_vram_gb")),
        kv_pool_gb=_positive(said.get("kv_pool_gb")),
        notes=tuple(_text(note) for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
    )


def _protocol(content: dict[str, Any], task: str) -> Protocol:
    metadata = _mapping(_mapping(_mapping(content, "configs"), task), "metadata")
    samples = _mapping(_mapping(content, "n-samples"), task)
    return Protocol(
        name=_text(metadata.get("protocol")),
        eval_len=_whole(metadata.get("eval_len")),
        stride=_whole(metadata.get("stride")),
        windows=_whole(metadata.get("windows")),
        scored_tokens=_whole(metadata.get("scored_tokens")),
        tokens_sha256=_text(metadata.get("tokens_sha256")) or None,
        text=_text(metadata.get("text")),
        tokenizer=_text(metadata.get("tokenizer")),
        harness=(
            f"version {_scalar(_mapping(content, 'versions').get(task))}",
            f"{_scalar(samples.get('effective'))} samples",
            f"{_scalar(_mapping(content, 'n-shot').get(task))}-shot",
        ),
    )


def model_arguments(said: object) -> dict[str, str]:
    """``config.model_args``, a dict or ``"key=value,key=value"``, as a dict of strings."""
    if isinstance(said, dict):
        return {str(key): _scalar(value) for key, value in said.items()}
    if not isinstance(said, str):
        return {}
    pairs = (part.split("=", 1) for part in said.split(",") if "=" in part)
    return {key.strip(): value.strip() for key, value in pairs}


def _checkpoint_name(arguments: dict[str, str]) -> str:
    for key in ("pretrained", "model", "path", "gguf_file", "filename"):
        if arguments.get(key):
            path = PurePosixPath(arguments[key].replace("\\", "/"))
            return clean(path.name)
    return ""


def _mapping_or_none(value: object) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _mapping(parent: dict[str, Any], key: str) -> dict[str, Any]:
    return _mapping_or_none(parent.get(key)) or {}


def _text(value: object) -> str:
    return clean(value) if isinstance(value, str) else ""


def _scalar(value: object) -> str:
    return clean(str(value)) if isinstance(value, (str, int, float)) else ""


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _positive(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _count(value: object) -> int | None:
    number = _positive(value)
    return None if number is None else int(number)


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 0 and number == int(number) else None
