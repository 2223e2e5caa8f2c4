"""How a result was made: what its file says of the run, and the harness command that repeats it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Settings of this project's perplexity tasks that go through --metadata; null, 0 and false are the default of those
# in _UNLESS_SET, and would only make the command longer.
_SETTINGS = ("protocol", "eval_len", "stride", "max_rows", "warmup_tokens", "bos", "blank_rows", "text_path", "dataset",
             "dataset_path", "dataset_name", "dataset_split", "dataset_files", "text_column", "max_text_rows",
             "chat_template")  # fmt: skip
_UNLESS_SET = {"warmup_tokens", "max_text_rows", "chat_template"}
_ABOUT_TEXT = ("text_sha256", "bos_applied", "blank_rows", "warmup_tokens", "distinct_tokens", "nonfinite_logprobs")
# `config` key, flag of `lm_eval run`, what the harness assumes by itself (lm_eval/config/evaluate_config.py, 0.4.13).
_FLAGS: tuple[tuple[str, str, Any], ...] = (
    ("limit", "--limit", None),
    ("batch_size", "--batch_size", 1),
    ("gen_kwargs", "--gen_kwargs", {}),
)
_SEEDS = (("random_seed", 0), ("numpy_seed", 1234), ("torch_seed", 1234), ("fewshot_seed", 1234))
_PLAIN = re.compile(r"[\w./:+@%-]+")
# Arguments that make a checkpoint's or a task's own code run: the reader must know before running the command.
_RUNS_CODE = ("trust_remote_code", "confirm_run_unsafe_code")


@dataclass(frozen=True, slots=True)
class Run:
    """What a result file says of its run, as it stands there: none of it is checked, some may be missing."""

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
        """From a whole result file."""
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
        said = self.model_args if isinstance(self.model_args, str) else json.dumps(self.model_args, default=str)
        return any(name in said for name in _RUNS_CODE)

    @property
    def about_text(self) -> dict[str, Any]:
        """What the result says of its tokens beyond the protocol, for a reader."""
        return {key: self.metadata[key] for key in _ABOUT_TEXT if self.metadata.get(key) is not None}


def command(run: Run, task: str) -> str | None:
    """The `lm_eval` command that repeats a run, quoted for a POSIX shell, a flag a line; None without a model."""
    if not run.model:
        return None
    words = ["lm_eval", "run", "--model", run.model]
    if run.model_args:
        words += ["--model_args", _arguments(run.model_args)]
    words += ["--tasks", task]
    settings = _settings(run)
    if settings:
        words += ["--metadata", json.dumps(settings, ensure_ascii=False)]
    for key, flag, usual in _FLAGS:
        value = run.config.get(key)
        if value is not None and value != usual:
            words += [flag, json.dumps(value) if isinstance(value, dict) else _number(value)]
    if run.shots and not run.metadata.get("protocol"):
        words += ["--num_fewshot", str(run.shots)]
    if run.chat:
        words.append("--apply_chat_template")
    if run.system_instruction:
        words += ["--system_instruction", run.system_instruction]
    seeds = [run.config.get(key, usual) for key, usual in _SEEDS]
    if seeds != [usual for _, usual in _SEEDS]:
        words += ["--seed", ",".join(map(str, seeds))]
    words += ["--output_path", "results/"]
    quoted = [shlex.quote(word) for word in words]
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in quoted)


def _settings(run: Run) -> dict[str, Any]:
    if not run.metadata.get("protocol"):
        return {}
    metadata, arguments = run.metadata, run.model_args if isinstance(run.model_args, dict) else {}
    found = {key: metadata[key] for key in _SETTINGS if metadata.get(key) is not None}
    found = {key: value for key, value in found.items() if value or key not in _UNLESS_SET}
    tokenizer = metadata.get("tokenizer")
    given = arguments or _string(run.model_args)
    if tokenizer and "tokenizer" not in given and tokenizer not in (arguments.get("pretrained"), None):
        found["tokenizer"] = tokenizer
    return found


def _arguments(said: Any) -> str:
    """As ``key=value,…`` where the harness reads that back as it was, else as JSON, which it takes as well."""
    if isinstance(said, str):
        return said
    plain = isinstance(said, dict) and all(
        isinstance(value, bool | int) or (isinstance(value, str) and _reads_as_text(value)) for value in said.values()
    )
    if plain:
        return ",".join(f"{key}={value}" for key, value in said.items())
    return json.dumps(said, ensure_ascii=False, default=str)


def _reads_as_text(value: str) -> bool:
    """Whether the harness' reader of ``key=value`` (lm_eval/_cli/utils.py) keeps this a string."""
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
