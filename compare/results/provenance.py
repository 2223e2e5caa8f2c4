"""How a result was produced: the run as its file records it, and the harness command that repeats it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Settings of this project's perplexity tasks that go through --metadata. Those in _UNLESS_SET have null, 0 or false as
# default, which is left out of the command.
_SETTINGS = ("protocol", "eval_len", "stride", "max_rows", "warmup_tokens", "bos", "blank_rows", "text_path", "dataset",
             "dataset_path", "dataset_name", "dataset_split", "dataset_files", "text_column", "max_text_rows",
             "chat_template")  # fmt: skip
_UNLESS_SET = {"warmup_tokens", "max_text_rows", "chat_template"}
_ABOUT_TEXT = ("text_sha256", "bos_applied", "blank_rows", "warmup_tokens", "distinct_tokens", "nonfinite_logprobs")
# `config` key, flag of `lm_eval run`, the harness' default (lm_eval/config/evaluate_config.py, 0.4.13).
_FLAGS: tuple[tuple[str, str, Any], ...] = (
    ("limit", "--limit", None),
    ("batch_size", "--batch_size", 1),
    ("gen_kwargs", "--gen_kwargs", {}),
)
_SEEDS = (("random_seed", 0), ("numpy_seed", 1234), ("torch_seed", 1234), ("fewshot_seed", 1234))
_PLAIN = re.compile(r"[\w./:+@%-]+")
# Arguments that run code of the checkpoint or the task, of which the reader is warned.
_RUNS_CODE = ("trust_remote_code", "confirm_run_unsafe_code")


@dataclass(frozen=True, slots=True)
class Run:
    """The run as a result file records it: unchecked, and possibly incomplete."""

    model: str = ""
    model_args: Any = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    shots: int | None = None
    chat: bool = False
    system_instruction: str = ""
    harness_version: str = ""
    transformers_version: str = ""

    @classmethod
    def of(cls, content: Mapping[str, Any], task: str) -> Run:
        """From the content of a result file."""
        config, shots = _mapping(content, "config"), _mapping(content, "n-shot").get(task)
        keys = {"limit", "batch_size", "gen_kwargs", *(key for key, _ in _SEEDS)}
        return cls(
            model=_string(config.get("model")),
            model_args=config.get("model_args"),
            config={key: config[key] for key in keys if key in config},
            metadata=_mapping(_mapping(_mapping(content, "configs"), task), "metadata"),
            shots=shots if isinstance(shots, int) and not isinstance(shots, bool) else None,
            chat=bool(content.get("chat_template")),
            system_instruction=_string(content.get("system_instruction")),
            harness_version=_string(content.get("lm_eval_version")),
            transformers_version=_string(content.get("transformers_version")),
        )

    @property
    def runs_foreign_code(self) -> bool:
        """Whether an argument allows code of the checkpoint or the task to run."""
        arguments = self.model_args if isinstance(self.model_args, str) else json.dumps(self.model_args, default=str)
        return any(name in arguments for name in _RUNS_CODE)

    @property
    def about_text(self) -> dict[str, Any]:
        """What the result records about its text and tokens beyond the protocol."""
        return {key: self.metadata[key] for key in _ABOUT_TEXT if self.metadata.get(key) is not None}


def command(run: Run, task: str) -> str | None:
    """The `lm_eval` command that repeats a run, quoted for a POSIX shell, one flag per line; None without a model."""
    if not run.model:
        return None
    arguments = ["lm_eval", "run", "--model", run.model]
    if run.model_args:
        arguments += ["--model_args", _arguments(run.model_args)]
    arguments += ["--tasks", task]
    settings = _settings(run)
    if settings:
        arguments += ["--metadata", json.dumps(settings, ensure_ascii=False)]
    for key, flag, usual in _FLAGS:
        value = run.config.get(key)
        if value is not None and value != usual:
            arguments += [flag, json.dumps(value) if isinstance(value, dict) else _number(value)]
    if run.shots and not run.metadata.get("protocol"):
        arguments += ["--num_fewshot", str(run.shots)]
    if run.chat:
        arguments.append("--apply_chat_template")
    if run.system_instruction:
        arguments += ["--system_instruction", run.system_instruction]
    seeds = [run.config.get(key, usual) for key, usual in _SEEDS]
    if seeds != [usual for _, usual in _SEEDS]:
        arguments += ["--seed", ",".join(map(str, seeds))]
    arguments += ["--output_path", "results/"]
    quoted = [shlex.quote(argument) for argument in arguments]
    return " ".join(f"\\\n  {argument}" if argument.startswith("--") else argument for argument in quoted)


def _settings(run: Run) -> dict[str, Any]:
    """The --metadata of this project's perplexity tasks; empty for other tasks."""
    if not run.metadata.get("protocol"):
        return {}
    metadata, arguments = run.metadata, run.model_args if isinstance(run.model_args, dict) else {}
    settings = {key: metadata[key] for key in _SETTINGS if metadata.get(key) is not None}
    settings = {key: value for key, value in settings.items() if value or key not in _UNLESS_SET}
    tokenizer = metadata.get("tokenizer")
    given = arguments or _string(run.model_args)
    if tokenizer and "tokenizer" not in given and tokenizer not in (arguments.get("pretrained"), None):
        settings["tokenizer"] = tokenizer
    return settings


def _arguments(arguments: Any) -> str:
    """As ``key=value,…`` where the harness reads that back unchanged, else as JSON, which it also accepts."""
    if isinstance(arguments, str):
        return arguments
    plain = isinstance(arguments, dict) and all(
        isinstance(value, bool | int) or (isinstance(value, str) and _reads_as_text(value))
        for value in arguments.values()
    )
    if plain:
        return ",".join(f"{key}={value}" for key, value in arguments.items())
    return json.dumps(arguments, ensure_ascii=False, default=str)


def _reads_as_text(value: str) -> bool:
    """Whether the harness' parser of ``key=value`` (lm_eval/_cli/utils.py) keeps the value a string."""
    if not _PLAIN.fullmatch(value) or value.lower() in ("true", "false", "none"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mapping(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""
