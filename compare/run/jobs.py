"""What is to be run: one `Job` a model, made of its entry, the data spec and the flags; and the key of its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.presentation import Presentation
from compare.run.engines import LOAD_FNS, OURS, PATH_ARGUMENTS, TAKES_TOKENIZER, engine_version
from compare.run.fingerprint import fingerprint
from compare.run.loading import Entry
from compare.run.paths import absolute, exists, resolve, trained_context
from compare.run.schema import DataSpec, GuideModel, HarnessOptions
from compare.run.windows import window_tasks

GIB = 1024**3

# Data sets that have a task under their own name; every other goes by `text_strided`, the same task.
_TASK_OF = {"wiki2": "wiki2_strided", "wikitext2": "wiki2_strided", "sample": "sample_strided"}
_OTHER_TEXT = "text_strided"
STRIDED = frozenset({*_TASK_OF.values(), _OTHER_TEXT})

# compare_q loads a model for `window + 512` tokens; the argument that says so
_SIZE_ARGUMENT = {"vllm_nvfp4": "max_model_len", "llamacpp": "max_length"}
_HEADROOM = 512


@dataclass(frozen=True)
class Divergence:
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
    divergence: Divergence | None = None
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
        args = {"label": self.label, **self.args} if self.model in OURS else dict(self.args)
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


def _options(options: HarnessOptions, file: Path) -> dict[str, Any]:
    given, missing = resolve(options.model_dump(exclude_none=True), file.parent, ("include_path",))
    if missing:
        raise CompareError(f"{file}: {missing}")
    return given


@dataclass(frozen=True)
class Plan:
    """The settings that all jobs of one command share."""

    data: DataSpec | None = None
    data_file: Path | None = None
    tasks: tuple[str, ...] = ()
    limit: float | None = None
    log_samples: bool = False

    def job(self, entry: Entry) -> Job:
        """What `entry` asks for. Raises CompareError where nothing says which task to run."""
        spec, folder = entry.spec, entry.file.parent
        unavailable = None
        if isinstance(spec, GuideModel):
            row = LOAD_FNS[spec.load_fn]
            model, unavailable = row.model, row.unavailable
            args: dict[str, Any] = dict(row.args)
            if isinstance(spec.model_dir, list):
                args |= {"pretrained": spec.model_dir[0], "override_tensors": spec.model_dir[1]}
            else:
                args["pretrained"] = spec.model_dir
            reference, first = False, spec.out_logits is not None
            out_logits = absolute(spec.out_logits, folder) if spec.out_logits else None
        else:
            model, args, reference, first, out_logits = spec.model, {}, spec.reference, spec.reference, None
        args |= spec.args
        args, missing = resolve(args, folder)
        tasks = self._tasks(entry)
        metadata = self._metadata(tasks)
        if "tokenizer" in metadata and model in TAKES_TOKENIZER:
            args.setdefault("tokenizer", metadata["tokenizer"])
        if isinstance(spec, GuideModel) and STRIDED.issuperset(tasks):
            self._size(model, args, metadata)
        bits = spec.override_vram_bits
        name = str(args.get("pretrained", model)).rstrip("/")
        shown = Presentation(
            label=spec.label or Path(name).name or name,
            family=spec.family,
            reference=reference,
            layer_bpw=spec.override_bpw_layer,
            head_bpw=spec.override_bpw_head,
            vram_gb=None if bits is None else bits / 8 / GIB,
        )
        options = _options(self.data.options, self.data_file) if self.data and self.data_file else {}
        options |= _options(spec.options, entry.file)
        return Job(
            shown=shown,
            model=model,
            args=args,
            tasks=tasks,
            metadata=metadata,
            options=options,
            limit=self.limit,
            gpus=spec.gpus,
            first=first,
            out_logits=out_logits,
            log_samples=self.log_samples,
            source=entry.source,
            unavailable=unavailable or missing,
        )

    def _tasks(self, entry: Entry) -> tuple[str, ...]:
        data = self.data
        chosen = self.tasks or entry.spec.tasks or (data.tasks if data else None)
        if chosen:
            return tuple(chosen)
        if data is None:
            raise CompareError(f'{entry.source}: no task: give a data spec with -d, --tasks, or "tasks" in the entry')
        return (_OTHER_TEXT,) if self._other_text(data) else (_TASK_OF[str(data.dataset).lower()],)

    @staticmethod
    def _other_text(data: DataSpec) -> bool:
        told = (data.dataset_path, data.dataset_name, data.dataset_split, data.text_column, data.dataset_files)
        return any(told) or str(data.dataset).lower() not in _TASK_OF

    def blank_rows(self) -> str:
        """Whether blank rows stay: in WikiText-2 (the guide's compare_q) and own texts, not in other data sets.

        The first compare_q knew WikiText-2 alone and kept them; the later one, which knew the others, dropped them.
        """
        data = self.data
        if data is None or data.blank_rows:
            return (data.blank_rows if data else None) or "keep"
        return "drop" if self._other_text(data) and not data.text_path else "keep"

    def _metadata(self, tasks: Sequence[str]) -> dict[str, Any]:
        data = self.data
        if data is None or self.data_file is None:
            return {}
        folder = self.data_file.parent
        said: dict[str, Any] = {"tokenizer": data.tokenizer_dir, "text_path": data.text_path, "bos": data.bos}
        said["blank_rows"] = self.blank_rows() if data.dataset or data.dataset_path else data.blank_rows
        if STRIDED.intersection(tasks):
            said |= {
                "dataset": data.dataset,
                "eval_len": data.eval_len,
                "stride": data.eval_stride,
                # none in the spec: all, as in compare_q; without a data set it is the task that says
                "max_rows": data.max_rows if data.max_rows or data.dataset else None,
                "dataset_path": data.dataset_path,
                "dataset_name": data.dataset_name,
                "dataset_split": data.dataset_split,
                "dataset_files": data.dataset_files,
                "text_column": data.text_column,
                "max_text_rows": data.max_text_rows or None,
                "warmup_tokens": data.warmup_tokens or None,
                "chat_template": data.chat_template or None,
            }
        said = {name: value for name, value in said.items() if value is not None}
        resolved, missing = resolve(said | data.metadata, folder, (*PATH_ARGUMENTS, "text_path"))
        if missing:
            raise CompareError(f"{self.data_file}: {missing}")
        return resolved

    def _size(self, model: str, args: dict[str, Any], metadata: dict[str, Any]) -> None:
        name, eval_len = _SIZE_ARGUMENT.get(model), metadata.get("eval_len")
        if name is None or eval_len is None or name in args:
            return
        size = eval_len + _HEADROOM * (2 if metadata.get("chat_template") else 1)
        trained = trained_context(args.get("pretrained"))
        args[name] = min(size, trained) if trained else size
