"""`Job`: one run of the harness, with its command line and its key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compare.results.label_index import Presentation
from compare.run.plan.fingerprint import fingerprint
from compare.run.plan.window_tasks import window_tasks
from compare.run.specs.engine_facts import measured_models
from compare.run.specs.engines import PATH_ARGUMENTS, PATH_SETTINGS, engine_version
from compare.run.specs.paths import exists


@dataclass(frozen=True)
class ReferenceRole:
    """A job's role in measuring divergence: it writes the reference store in `folder`, or is measured against it.

    reference: the `Job.fingerprint` of the model that writes the store; it is part of keys, the folder is not, so a
    store may be moved.
    """

    folder: Path
    reference: str
    writes: bool = False

    @property
    def named(self) -> bool:
        """Whether the user chose the folder; all others are named after the reference they hold."""
        return self.folder.name != self.reference


@dataclass(frozen=True)
class Job:
    """One run of the harness.

    first: its entry is the reference that the others are measured against, so it runs before them. out_logits: the
    folder in which its entry wants references stored. source: the entry, for messages. unavailable: why it cannot be
    run at all, None where it can be tried.
    """

    shown: Presentation
    model: str
    args: dict[str, Any]
    tasks: tuple[str, ...]
    metadata: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    gpus: int = 1
    first: bool = False
    out_logits: Path | None = None
    divergence: ReferenceRole | None = None
    log_samples: bool = False
    source: str = ""
    unavailable: str | None = None

    @property
    def label(self) -> str:
        return self.shown.label

    @property
    def checkpoint(self) -> str:
        """The path or hub id that is loaded; the harness model where no argument names one."""
        return str(self.args.get("pretrained") or self.args.get("model") or self.model)

    @property
    def eval_len(self) -> int | None:
        """Tokens per window, where the data spec gives them."""
        value = self.metadata.get("eval_len")
        return value if isinstance(value, int) else None

    @property
    def windows(self) -> frozenset[str]:
        """Its tasks that score token windows: those for which divergence can be measured."""
        return window_tasks(self.tasks)

    def arguments(self, output: Path) -> list[str]:
        """The arguments of `lm_eval`, which writes its result file into the folder `output`."""
        args = {"label": self.label, **self.args} if self.model in measured_models() else dict(self.args)
        if self.divergence is not None:
            args["save_reference" if self.divergence.writes else "reference"] = str(self.divergence.folder)
        words = ["run", "--model", self.model]
        if args:
            words += ["--model_args", json.dumps(args, ensure_ascii=False)]
        words += ["--tasks", ",".join(self.tasks)]
        if self.metadata:
            words += ["--metadata", json.dumps(self.metadata, ensure_ascii=False)]
        if self.limit is not None:
            words += ["--limit", f"{self.limit:.15g}"]
        for name, value in self.options.items():
            if value is not False:
                words += [f"--{name}"] if value is True else [f"--{name}", _text(value)]
        if self.log_samples:
            words.append("--log_samples")
        return [*words, "--output_path", str(output / "results.json")]

    def key(self) -> str:
        """Identifies this computation: model, task settings, content of every file named, engine and its version.

        Not part of it: label, family and figures given in the spec; paths; logged samples, which may lie beside a
        result. Of divergence, only the reference counts. Raises OSError where a file cannot be read.
        """
        identity: dict[str, Any] = {
            "model": self.model,
            "args": {name: _content(name, value) for name, value in self.args.items() if name != "label"},
            "tasks": sorted(self.tasks),
            "metadata": {name: _content(name, value) for name, value in self.metadata.items()},
            "options": self.options,
            "limit": self.limit,
            "engine": engine_version(self.model),
            "protocol": engine_version("lmeval-ext"),  # windows, tokens and metrics are ours
        }
        if self.divergence is not None:  # only then, so that results without it keep their keys
            identity["divergence"] = ["writes" if self.divergence.writes else "against", self.divergence.reference]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]

    def fingerprint(self) -> str:
        """Identifies the model as it is run, for any tasks: a reference store tells windows apart, but not models.

        Raises OSError where a file cannot be read.
        """
        return replace(self, tasks=(), metadata={}, limit=None, divergence=None).key()


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _content(name: str, value: Any) -> Any:
    """For a path that exists, the fingerprint of its content; every other value unchanged."""
    if isinstance(value, list):
        return [_content(name, item) for item in value]
    if name not in (*PATH_ARGUMENTS, *PATH_SETTINGS) or not isinstance(value, str) or not exists(Path(value)):
        return value
    return f"content {fingerprint(Path(value), tokenizer_only=name == 'tokenizer')}"
