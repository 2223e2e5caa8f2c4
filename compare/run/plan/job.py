"""`Job`: one run of the harness, its command line and its key."""

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
from compare.run.specs.engines import PATH_ARGUMENTS, engine_version
from compare.run.specs.paths import exists


@dataclass(frozen=True)
class ReferenceRole:
    """A job's part in measuring divergence: it writes the reference store in `folder`, or is measured against it.

    reference: names the model that wrote it (`Job.fingerprint`), in keys; the folder does not, and may be another one.
    """

    folder: Path
    reference: str
    writes: bool = False

    @property
    def named(self) -> bool:
        """Whether a person chose the folder; others have the name of what they hold."""
        return self.folder.name != self.reference


@dataclass(frozen=True)
class Job:
    """One run of the harness.

    first: its entry is the reference that the others are measured against; before all others. out_logits: the folder
    that its entry wants references kept in. unavailable: why it cannot be run at all, None where it can be tried.
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
        """The path or hub id that is loaded, as the user may know it."""
        return str(self.args.get("pretrained") or self.args.get("model") or self.model)

    @property
    def eval_len(self) -> int | None:
        """Tokens a window, where the data spec says it."""
        value = self.metadata.get("eval_len")
        return value if isinstance(value, int) else None

    @property
    def windows(self) -> frozenset[str]:
        """Its tasks that score token windows: those in which a divergence can be measured."""
        return window_tasks(self.tasks)

    def arguments(self, output: Path) -> list[str]:
        """The arguments of `lm_eval`; it writes its result file into `output`."""
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
        """Names this computation: spec, task settings, content of every file named, engine and its version.

        Label, family and told figures take no part, nor do paths, nor logged samples, which lie beside a result or do
        not. Of divergence, the reference counts. Raises OSError where a file cannot be read.
        """
        said: dict[str, Any] = {
            "model": self.model,
            "args": {name: _content(name, value) for name, value in self.args.items() if name != "label"},
            "tasks": sorted(self.tasks),
            "metadata": {name: _content(name, value) for name, value in self.metadata.items()},
            "options": self.options,
            "limit": self.limit,
            "engine": engine_version(self.model),
            "protocol": engine_version("lmeval-ext"),  # windows, tokens and metrics are ours
        }
        if self.divergence is not None:  # left out elsewhere: results of runs without it keep their keys
            said["divergence"] = ["writes" if self.divergence.writes else "against", self.divergence.reference]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]

    def fingerprint(self) -> str:
        """Names the model as it is run, whatever the tasks: a store tells windows by their tokens, but not models.

        Raises OSError where a file cannot be read.
        """
        return replace(self, tasks=(), metadata={}, limit=None, divergence=None).key()


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _content(name: str, value: Any) -> Any:
    """A path that exists as what it holds; everything else as it is."""
    if isinstance(value, list):
        return [_content(name, item) for item in value]
    if name not in (*PATH_ARGUMENTS, "text_path") or not isinstance(value, str) or not exists(Path(value)):
        return value
    return f"content {fingerprint(Path(value), tokenizer_only=name == 'tokenizer')}"
