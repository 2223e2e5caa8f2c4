"""The settings of a harness task that decide its figure, from the files of lm-eval 0.3 to 0.4.13.

What each version writes (``evaluator.simple_evaluate``, ``EvaluationTracker.save_results_aggregated``):

========== ==================================================================================================
0.3        ``config``: num_fewshot, limit, description_dict; ``versions``. No n-shot, n-samples, configs
0.4.0–2    ``n-shot``, ``configs``, ``config.limit``, ``config.gen_kwargs``; no n-samples
0.4.3 on   ``n-samples``, ``chat_template(_sha)``, ``system_instruction(_sha)``, ``fewshot_as_multiturn``,
           ``task_hashes`` (with --log_samples), ``config.fewshot_seed``, ``max_length``
========== ==================================================================================================

A version without chat templates or system prompts applied none. Every other setting that a file does not have is
unknown, and is not equal to an unknown setting of another file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compare.results.groups import Tree, common, leaves, total
from compare.results.values import flag, integer, mapping, number, scalar, text
from compare.text import clean

ROLLING = "loglikelihood_rolling"
GENERATION = "generate_until"
# Metrics of rolling log-likelihoods (lm_eval/api/task.py), by which files of 0.3 show what kind of task they have.
_ROLLING_METRICS = {"word_perplexity", "byte_perplexity", "bits_per_byte"}
_USUAL_FEWSHOT_SEED = 1234
# Model arguments that change the prompt or the scored tokens, whatever the model (lm_eval/models).
_PROMPT_ARGUMENTS = (
    "add_bos_token",
    "prefix_token_id",
    "custom_prefix_token_id",
    "truncation",
    "truncation_side",
    "chat_template_args",
    "enable_thinking",
    "think_start_token",
    "think_end_token",
)
_GENERATION_ARGUMENTS = ("max_gen_toks",)
_LENGTH_ARGUMENTS = ("max_length", "max_model_len", "n_ctx", "max_seq_len")
# Fields of ``configs.TASK`` that decide the prompts, and the value that stands for "not set".
_TASK_FIELDS: tuple[tuple[str, Any], ...] = (
    ("dataset_path", None),
    ("dataset_name", None),
    ("test_split", None),
    ("validation_split", None),
    ("fewshot_split", None),
    ("doc_to_text", None),
    ("doc_to_target", None),
    ("doc_to_choice", None),
    ("description", ""),
    ("target_delimiter", " "),
    ("fewshot_delimiter", "\n\n"),
    ("gen_prefix", None),
    ("repeats", 1),
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """The settings that must be equal for two figures of a task without token windows to be comparable.

    stated: each as text for a reader. configuration: digest of the task's prompt configuration, generation arguments
    excluded; empty where the file has none. task_hash: digest of the prompts and answers that were scored; empty where
    they were not logged. unknown: names of settings that the file does not have.
    """

    stated: tuple[str, ...]
    configuration: str
    task_hash: str
    unknown: tuple[str, ...]


def read_settings(content: Mapping[str, Any], tree: Tree, task: str) -> TaskSettings:
    """The settings of `task`, or of all subtasks of a group, from the content of a result file."""
    reader = _Reader(dict(content), tree, task)
    return TaskSettings(tuple(reader.stated()), reader.configuration(), reader.task_hash(), tuple(reader.unknown))


class _Reader:
    """Reads one task's settings; collects the names of unknown ones in `unknown`."""

    def __init__(self, content: dict[str, Any], tree: Tree, task: str) -> None:
        self.content, self.tree, self.task = content, tree, task
        self.config = mapping(content, "config")
        self.configs = [mapping(mapping(content, "configs"), leaf) for leaf in leaves(tree, task)]
        self.arguments = model_arguments(self.config.get("model_args"))
        self.unknown: list[str] = []

    def stated(self) -> Iterator[str]:
        yield f"version {self._version() or self._missing('task version')}"
        yield self._samples()
        shots = self._shots()
        yield f"{shots}-shot"
        if self.task in self.tree:
            yield f"{len(leaves(self.tree, self.task))} subtasks"
        yield from self._fewshot_form(shots)
        yield from self._chat(shots)
        yield from self._prompt_arguments()
        if self._is_rolling():
            yield f"max_length {self._max_length() or self._missing('max_length')}"
        yield from self._generation()

    def _missing(self, name: str) -> str:
        self.unknown.append(name)
        return "unknown"

    def _over_leaves(self, value_of: Callable[[str], str]) -> str:
        """The value that all subtasks share; where they differ, a digest of them; empty where one has none."""
        values = {leaf: value_of(leaf) for leaf in leaves(self.tree, self.task)}
        if not all(values.values()):
            return ""
        distinct = set(values.values())
        return distinct.pop() if len(distinct) == 1 else f"mixed ({_digest(values)})"

    def _version(self) -> str:
        return self._version_of(self.task) or (self._over_leaves(self._version_of) if self.task in self.tree else "")

    def _version_of(self, name: str) -> str:
        metadata = mapping(mapping(self.content, "configs"), name).get("metadata")
        if isinstance(metadata, list):  # lm-eval 0.4.0
            metadata = next((entry for entry in metadata if isinstance(entry, dict)), None)
        stated = scalar(mapping(self.content, "versions").get(name))
        if not stated and isinstance(metadata, dict):
            stated = scalar(metadata.get("version"))
        return "" if stated in ("N/A", "Yaml") else stated

    def _samples(self) -> str:
        counts, results = mapping(self.content, "n-samples"), mapping(self.content, "results")

        def effective(name: str) -> int | None:
            counted = integer(mapping(counts, name).get("effective"))
            return counted if counted is not None else integer(mapping(results, name).get("sample_len"))

        samples = total(self.tree, self.task, effective)
        if samples is not None:
            return f"{samples} samples"
        if "limit" in self.config and self.config["limit"] is None:
            return "all samples"
        limit = number(self.config.get("limit"))
        if limit is None or limit <= 0:
            return f"{self._missing('number of samples')} samples"
        return f"first {int(limit)} samples" if limit >= 1 else f"first {limit:.4%} of the samples"

    def _shots(self) -> str:
        stated = mapping(self.content, "n-shot")

        def shots(name: str) -> str:
            candidates = (
                stated.get(name),
                mapping(mapping(self.content, "configs"), name).get("num_fewshot"),
                self.config.get("num_fewshot"),
            )
            counted = [count for value in candidates if (count := integer(value)) is not None]
            return str(counted[0]) if counted else ""

        below = self._over_leaves(shots)
        return below or scalar(common(self.tree, self.task, stated.get)) or self._missing("few-shot count")

    def _fewshot_form(self, shots: str) -> Iterator[str]:
        """Seed and sampler of the examples, and the descriptions that 0.3 put before them."""
        if shots != "0":
            seed = integer(self.config.get("fewshot_seed"))
            if seed is not None and seed != _USUAL_FEWSHOT_SEED:
                yield f"few-shot seed {seed}"
            chosen = [config.get("fewshot_config") for config in self.configs]
            sampled = [_without_usual(value) for value in chosen]
            if any(sampled):
                yield f"few-shot configuration {_digest(sampled)}"
        descriptions = self.config.get("description_dict")
        if descriptions:
            yield f"description {_digest(descriptions)}"

    def _chat(self, shots: str) -> Iterator[str]:
        # without a chat template, the harness ignores fewshot_as_multiturn (lm_eval/api/task.py, fewshot_context)
        template, multiturn = self.content.get("chat_template"), self.content.get("fewshot_as_multiturn")
        sha = text(self.content.get("chat_template_sha"))
        if template or sha:
            if sha or isinstance(template, str):
                yield f"chat template {sha[:8] or _text_digest(str(template))}"
            else:
                yield f"chat template {self._missing('chat template')}"
            if flag(multiturn) is not None:
                yield f"few-shot examples as {'turns' if multiturn else 'one message'}"
            elif shots != "0":
                yield f"few-shot examples in {self._missing('few-shot form')} form"
        prompt, sha = self.content.get("system_instruction"), text(self.content.get("system_instruction_sha"))
        if prompt or sha:
            yield f"system prompt {sha[:8] or _digest(prompt)}"

    def _prompt_arguments(self) -> Iterator[str]:
        bos = mapping(mapping(self.config, "quantization"), "bos").get("add_bos_token")
        for name in _PROMPT_ARGUMENTS:
            value = scalar(bos) if name == "add_bos_token" and isinstance(bos, bool) else self.arguments.get(name, "")
            if value and value.lower() != "none":
                yield f"{name} {value.capitalize() if value.lower() in ('true', 'false') else value}"

    def _is_rolling(self) -> bool:
        kinds = [config.get("output_type") for config in self.configs]
        if any(kinds):
            return ROLLING in kinds
        figures = mapping(mapping(self.content, "results"), self.task)
        return any(key.partition(",")[0] in _ROLLING_METRICS for key in figures)

    def _max_length(self) -> str:
        """Tokens per window of a rolling task: as the model said, else as its arguments."""
        stated = integer(self.content.get("max_length"))
        if stated:
            return str(stated)
        return next((self.arguments[name] for name in _LENGTH_ARGUMENTS if self.arguments.get(name, "").isdigit()), "")

    def _generation(self) -> Iterator[str]:
        if GENERATION not in [config.get("output_type") for config in self.configs]:
            return
        if self.config.get("gen_kwargs"):
            yield f"gen_kwargs {clean(json.dumps(self.config['gen_kwargs'], sort_keys=True, ensure_ascii=False))}"
        own = {str(config.get("task")): config["generation_kwargs"] for config in self.configs
               if config.get("generation_kwargs")}  # fmt: skip
        if own:
            yield f"generation arguments {_digest(own)}"
        for name in _GENERATION_ARGUMENTS:
            if self.arguments.get(name):
                yield f"{name} {self.arguments[name]}"

    def configuration(self) -> str:
        fields = {
            leaf: {
                name: config[name] for name, unset in _TASK_FIELDS if config.get(name) is not None
                and config[name] != unset
            }
            for leaf, config in zip(leaves(self.tree, self.task), self.configs, strict=True)
        }  # fmt: skip
        if self.task in self.tree:
            fields["versions"] = {
                "of": self._over_leaves(self._version_of) or self._missing("versions of the subtasks")
            }
        return _digest(fields) if any(fields.values()) else ""

    def task_hash(self) -> str:
        hashes = mapping(self.content, "task_hashes")
        each = [text(hashes.get(leaf)) for leaf in leaves(self.tree, self.task)]
        return _digest(each) if all(each) else ""


def model_arguments(value: object) -> dict[str, str]:
    """``config.model_args``, a dict or ``"key=value,key=value"``, as a dict of strings."""
    if isinstance(value, dict):
        return {str(key): scalar(argument) or _compact(argument) for key, argument in value.items()}
    if not isinstance(value, str):
        return {}
    pairs = (part.split("=", 1) for part in value.split(",") if "=" in part)
    return {key.strip(): argument.strip() for key, argument in pairs}


def _compact(value: object) -> str:
    """A list or an object as text; empty for null."""
    return "" if value is None or value == "" else clean(_canonical(value))


def _without_usual(value: object) -> object:
    """A few-shot configuration without the fields at their default, which older versions do not write."""
    if not isinstance(value, dict):
        return value
    usual = {"sampler": "default", "fewshot_delimiter": "\n\n", "target_delimiter": " "}
    return {key: entry for key, entry in value.items() if entry is not None and usual.get(key) != entry}


def _canonical(value: object) -> str:
    return _ADDRESS.sub("", json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))


def _digest(value: object) -> str:
    """Eight hexadecimal digits, equal for equal content; the address of a function does not count."""
    return _text_digest(_canonical(value))


def _text_digest(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:8]
