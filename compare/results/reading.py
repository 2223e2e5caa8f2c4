"""Reads a result file into records. The file is not trusted; errors name what does not fit.

The file format is the harness' own (``EvaluationTracker.save_results_aggregated``), plus ``config.quantization``
and the ``configs.TASK.metadata`` of this project's perplexity tasks.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from compare.families import canonical_family
from compare.results.discover import MAX_BYTES, Problem, find_result_files
from compare.results.divergence import read_divergence
from compare.results.groups import Tree, common, group_tree, leaves
from compare.results.inferred_quantization import infer_quantization
from compare.results.label_index import Relabelling
from compare.results.positions import read_positions
from compare.results.provenance import Run
from compare.results.records import KVCacheSize, MetricValue, ProtocolRecord, Quantization, Record
from compare.results.settings import model_arguments, read_settings
from compare.results.values import count, flag, integer, mapping, mapping_or_none, not_a_number, number, positive, text
from compare.text import clean, split_colour_tag

_CHECKPOINT_ARGUMENTS = ("pretrained", "model", "path", "gguf_file", "filename")
# Model arguments that neither choose the weights nor change how they are stored or computed. Those that change the
# prompt or the windows are settings (`compare.results.settings`). An argument that is not here makes another model.
_NOT_THE_MODEL = {
    "label", "batch_size", "max_batch_size", "device", "device_map", "device_map_option", "parallelize",
    "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tensor_parallel_size", "data_parallel_size",
    "pipeline_parallel_size", "gpu_memory_utilization", "swap_space", "max_num_seqs", "max_num_batched_tokens",
    "enforce_eager", "cache_dir", "gpus", "n_threads", "threads", "num_concurrent", "max_retries", "timeout",
    "disable_log_stats", "low_cpu_mem_usage", "max_length", "max_model_len", "max_gen_toks", "reference",
    "save_reference",
}  # fmt: skip
_LOGLIKELIHOODS = {"multiple_choice", "loglikelihood", "loglikelihood_rolling"}
_NOT_METRICS = {"alias", "name", "sample_len", "sample_count", "samples"}


@dataclass
class Reading:
    """The records below the given paths, and the paths that could not be used."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_results(paths: Iterable[Path]) -> Reading:
    """Reads every record below `paths`; files without a record are in `problems`, with the reason."""
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
    """The records of one file. Raises ValueError (what is wrong) or OSError (why it cannot be read)."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"has {status.st_size:,} bytes, more than any result file")
    content = mapping_or_none(_parse(path.read_bytes()))
    if content is None or not isinstance(content.get("results"), dict):
        raise ValueError('is not a harness result file (expected an object with "results")')
    tree = group_tree(content)
    broken = tuple(_not_numbers(content))
    records = [
        replace(record, not_numbers=broken)
        for task, figures in (mapping(content, "groups") | content["results"]).items()
        if isinstance(figures, dict) and (record := _record(path, content, tree, task, figures, status.st_mtime))
    ]
    if not records:
        raise ValueError("has no task with a figure")
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


def _record(
    path: Path, content: dict[str, Any], tree: Tree, task: str, figures: dict[str, Any], modified: float
) -> Record | None:
    directions = mapping(content, "higher_is_better")
    metrics = _metrics(figures, lambda name: common(tree, task, lambda t: flag(mapping(directions, t).get(name))))
    if not metrics:
        return None
    config = mapping(content, "config")
    metadata = mapping(mapping(mapping(content, "configs"), task), "metadata")
    model = text(config.get("model"))
    arguments = model_arguments(config.get("model_args"))
    checkpoint = _checkpoint_name(arguments)
    quantization = _quantization(config, arguments, checkpoint)
    if (quantization.nan_loglikelihoods and _rests_on_loglikelihoods(content, tree, task)) or _has_nan(
        content, tree, task
    ):
        metrics = {key: replace(metric, value=None, stderr=None) for key, metric in metrics.items()}
    raw_label = mapping(config, "quantization").get("label")
    fallback = " ".join(part for part in (model, checkpoint) if part) or text(content.get("model_name"))
    label, colour = split_colour_tag(text(raw_label) or fallback or path.stem)
    return Record(
        label=label or fallback or path.stem,
        colour=colour,
        task=clean(task),
        alias=text(figures.get("alias")).lstrip(" -"),
        groups=tree,
        metrics=metrics,
        quantization=quantization,
        protocol=_protocol(content, tree, task),
        model=model,
        checkpoint=checkpoint,
        chosen_by=_chosen_by(arguments),
        run=Run.of(content, task),
        date=number(content.get("date")) or modified,
        file=path,
        divergence=read_divergence(metadata),
        positions=read_positions(metadata),
    )


def _metrics(figures: dict[str, Any], direction: Callable[[str], bool | None]) -> dict[str, MetricValue]:
    """The figures of a task by key, ``"acc,none"``, each with its standard error."""
    metrics: dict[str, MetricValue] = {}
    for key, value in figures.items():
        name, _, filter_name = key.partition(",")
        if not _is_figure_key(key) or not _is_figure(value):
            continue
        stderr = number(figures.get(f"{name}_stderr,{filter_name}" if filter_name else f"{name}_stderr"))
        metrics[clean(key)] = MetricValue(
            value=number(value),
            stderr=stderr if stderr is None or stderr >= 0 else None,
            higher_is_better=direction(name),
        )
    return metrics


def _rests_on_loglikelihoods(content: dict[str, Any], tree: Tree, task: str) -> bool:
    """Whether a task's figures come from the harness' log-likelihoods; a window task checks its own for NaN."""
    configs = mapping(content, "configs")
    tasks = [mapping(configs, leaf) for leaf in leaves(tree, task)]
    return any(
        text(config.get("output_type")) in _LOGLIKELIHOODS and not mapping(config, "metadata").get("protocol")
        for config in tasks
    )


def _has_nan(content: dict[str, Any], tree: Tree, task: str) -> bool:
    """Whether a figure of a harness task, or of one of a group's, is NaN.

    The others come from the same log-likelihoods: the largest of several NaN is the first, an arbitrary answer.
    """
    results = mapping(content, "results") | mapping(content, "groups")
    for name in [task, *leaves(tree, task)]:
        if mapping(mapping(mapping(content, "configs"), name), "metadata").get("protocol"):
            continue  # a window task leaves out what it could not compute, and counts it
        if any(_is_nan(figure) for key, figure in mapping(results, name).items() if _is_figure_key(key)):
            return True
    return False


def _is_nan(figure: object) -> bool:
    return not_a_number(figure) and "nan" in str(figure).lower()


def _is_figure_key(key: str) -> bool:
    name = key.partition(",")[0]
    return name not in _NOT_METRICS and not name.endswith("_stderr")


def _not_numbers(content: dict[str, Any]) -> Iterator[str]:
    """The figures of a run that are NaN or infinite, and its NaN log-probabilities where the file counts them."""
    for task, figures in (mapping(content, "groups") | mapping(content, "results")).items():
        for key, figure in figures.items() if isinstance(figures, dict) else ():
            if _is_figure_key(key) and not_a_number(figure):
                yield clean(f"{task}/{key.removesuffix(',none')}")
        metadata = mapping(mapping(mapping(content, "configs"), task), "metadata")
        nonfinite = count(metadata.get("nonfinite_logprobs"))
        if nonfinite:
            yield clean(f"{task}: {nonfinite:,} log-probabilities")
    loglikelihoods = count(mapping(mapping(content, "config"), "quantization").get("nan_loglikelihoods"))
    if loglikelihoods:
        yield f"{loglikelihoods:,} log-likelihoods"


def _is_figure(value: object) -> bool:
    """Whether a value is a number, or null or "nan", which stand for a number that could not be computed."""
    return value is None or not_a_number(value) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _quantization(config: dict[str, Any], arguments: dict[str, str], checkpoint: str) -> Quantization:
    """The quantization block, or what the harness' own model types allow to infer."""
    block = mapping_or_none(config.get("quantization"))
    if block is None:
        return infer_quantization(config, arguments, checkpoint)
    notes = block.get("notes")
    return Quantization(
        known=True,
        family=canonical_family(text(block.get("family")) or "unknown"),
        scheme=text(block.get("scheme")),
        layer_bpw=positive(block.get("layer_bpw")),
        head_bpw=positive(block.get("head_bpw")),
        vram_gb=positive(block.get("vram_gb")),
        file_bpw=positive(block.get("file_bpw")),
        weight_bytes=count(block.get("weight_bytes")),
        layer_parameters=count(block.get("layer_parameters")),
        architecture=text(block.get("architecture")),
        draft_bytes=count(block.get("draft_bytes")) or 0,
        kv_bytes_per_token=count(block.get("kv_bytes_per_token")),
        kv_cache=_kv_cache(block.get("kv_cache")),
        kv_cache_dtype=text(block.get("kv_cache_dtype")),
        engine=text(block.get("engine")),
        engine_version=text(block.get("engine_version")),
        kernel=text(block.get("kernel")) or None,
        dtype=text(block.get("dtype")),
        device=text(block.get("device")),
        revision=text(block.get("revision")),
        scoring=text(block.get("scoring")),
        tokens_per_second=positive(block.get("tokens_per_second")),
        peak_vram_gb=positive(block.get("peak_vram_gb")),
        kv_pool_gb=positive(block.get("kv_pool_gb")),
        nan_loglikelihoods=count(block.get("nan_loglikelihoods")) or 0,
        notes=tuple(text(note) for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
    )


def _kv_cache(block: object) -> KVCacheSize | None:
    """The size of the KV cache by context; None if the file has none (older files), or one that cannot be read."""
    content = mapping_or_none(block) or {}
    entries, state, bound = content.get("groups"), integer(content.get("state_bytes")), content.get("upper_bound")
    if not isinstance(entries, list) or state is None or not isinstance(bound, bool):
        return None
    groups: list[tuple[int, int | None]] = []
    for item in entries:
        entry = mapping_or_none(item) or {}
        size, window = count(entry.get("bytes_per_token")), count(entry.get("window"))
        if size is None or (window is None and entry.get("window", 0) is not None):
            return None
        groups.append((size, window))
    return KVCacheSize(tuple(groups), state, bound)


def _protocol(content: dict[str, Any], tree: Tree, task: str) -> ProtocolRecord:
    metadata = mapping(mapping(mapping(content, "configs"), task), "metadata")
    settings = read_settings(content, tree, task)
    return ProtocolRecord(
        name=text(metadata.get("protocol")),
        eval_len=integer(metadata.get("eval_len")),
        stride=integer(metadata.get("stride")),
        windows=integer(metadata.get("windows")),
        scored_tokens=integer(metadata.get("scored_tokens")),
        tokens_sha256=text(metadata.get("tokens_sha256")) or None,
        text=text(metadata.get("text")),
        tokenizer=text(metadata.get("tokenizer")),
        harness=settings.stated,
        configuration=settings.configuration,
        task_hash=settings.task_hash,
        unknown=settings.unknown,
    )


def _chosen_by(arguments: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The arguments that choose the model, by name; those that only place or speed it up, or are settings, are not."""
    kept = {name: value for name, value in arguments.items() if name not in _NOT_THE_MODEL and value}
    kept |= {name: kept[name].replace("\\", "/").rstrip("/") for name in _CHECKPOINT_ARGUMENTS if name in kept}
    return tuple(sorted((clean(name), clean(value)) for name, value in kept.items()))


def _checkpoint_name(arguments: dict[str, str]) -> str:
    """The last part of the checkpoint's path; empty where no argument names one."""
    for key in _CHECKPOINT_ARGUMENTS:
        if arguments.get(key):
            path = PurePosixPath(arguments[key].replace("\\", "/"))
            return clean(path.name)
    return ""
