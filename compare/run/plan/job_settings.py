"""`JobSettings`: makes one `Job` of each entry, from the data spec and the flags that all jobs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.comparison.memory import GIB
from compare.errors import CompareError
from compare.results.label_index import Presentation
from compare.run.plan.job import Job
from compare.run.specs.engine_facts import measured_models
from compare.run.specs.engines import LOAD_FNS, PATH_ARGUMENTS, PATH_SETTINGS
from compare.run.specs.loading import Entry
from compare.run.specs.paths import absolute, resolve, trained_context
from compare.run.specs.schema import DataSpec, GuideModel, HarnessOptions

# Data sets that have a task of their own name; all others use `text_strided`, which scores the same windows.
_TASK_OF = {"wiki2": "wiki2_strided", "wikitext2": "wiki2_strided", "sample": "sample_strided"}
_OTHER_TEXT = "text_strided"
STRIDED = frozenset({*_TASK_OF.values(), _OTHER_TEXT})

# compare_q loads a model for `window + 512` tokens
_HEADROOM = 512


def _options(options: HarnessOptions, file: Path) -> dict[str, Any]:
    """The options that are set, with paths counted from `file`. Raises CompareError where one is not there."""
    given, missing = resolve(options.model_dump(exclude_none=True), file.parent, ("include_path",))
    if missing:
        raise CompareError(f"{file}: {missing}")
    return given


@dataclass(frozen=True)
class JobSettings:
    """The settings that all jobs of one command share.

    data_file: where `data` was read from; paths in it count from there. tasks: replace those of the specs, if any are
    given. limit: windows or samples per task.
    """

    data: DataSpec | None = None
    data_file: Path | None = None
    tasks: tuple[str, ...] = ()
    limit: float | None = None
    log_samples: bool = False

    def job(self, entry: Entry) -> Job:
        """The job of `entry`. Raises CompareError where nothing says which task to run."""
        spec, folder = entry.spec, entry.file.parent
        if isinstance(spec, GuideModel):
            row = LOAD_FNS[spec.load_fn]
            model = row.model
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
        facts = measured_models().get(model)
        if "tokenizer" in metadata and facts is not None and facts.needs_tokenizer:
            args.setdefault("tokenizer", metadata["tokenizer"])
        if isinstance(spec, GuideModel) and STRIDED.issuperset(tasks):
            self._size(facts.context_argument if facts is not None else None, args, metadata)
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
            unavailable=missing,
        )

    def _tasks(self, entry: Entry) -> tuple[str, ...]:
        """The tasks of --tasks, else of the entry, else of the data spec, else the one for its text."""
        data = self.data
        chosen = self.tasks or entry.spec.tasks or (data.tasks if data else None)
        if chosen:
            return tuple(chosen)
        if data is None:
            raise CompareError(f'{entry.source}: no task: give a data spec with -d, --tasks, or "tasks" in the entry')
        return (_OTHER_TEXT,) if self._other_text(data) else (_TASK_OF[str(data.dataset).lower()],)

    @staticmethod
    def _other_text(data: DataSpec) -> bool:
        """Whether the text is not one of the data sets in `_TASK_OF` as it is."""
        fields = (data.dataset_path, data.dataset_name, data.dataset_split, data.text_column, data.dataset_files)
        return any(fields) or str(data.dataset).lower() not in _TASK_OF

    def blank_rows(self) -> str:
        """``"keep"`` or ``"drop"``; by default, WikiText-2 and the user's own texts keep blank rows, others drop them.

        The first compare_q (the guide's) had WikiText-2 only and kept them; the later one, with more data sets, dropped
        them.
        """
        data = self.data
        if data is None or data.blank_rows:
            return (data.blank_rows if data else None) or "keep"
        return "drop" if self._other_text(data) and not data.text_path else "keep"

    def _metadata(self, tasks: Sequence[str]) -> dict[str, Any]:
        """The task settings of the data spec, under the names that our tasks give them."""
        data = self.data
        if data is None or self.data_file is None:
            return {}
        folder = self.data_file.parent
        metadata: dict[str, Any] = {"tokenizer": data.tokenizer_dir, "text_path": data.text_path, "bos": data.bos}
        metadata["blank_rows"] = self.blank_rows() if data.dataset or data.dataset_path else data.blank_rows
        if STRIDED.intersection(tasks):
            metadata |= {
                "dataset": data.dataset,
                "eval_len": data.eval_len,
                "stride": data.eval_stride,
                # 0 or none in the spec: all rows, as in compare_q; without a data set the task's own setting counts
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
        metadata = {name: value for name, value in metadata.items() if value is not None}
        resolved, missing = resolve(metadata | data.metadata, folder, (*PATH_ARGUMENTS, *PATH_SETTINGS))
        if missing:
            raise CompareError(f"{self.data_file}: {missing}")
        return resolved

    def _size(self, name: str | None, args: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Add the context length, in tokens, that compare_q would load the model for; never more than was trained."""
        eval_len = metadata.get("eval_len")
        if name is None or eval_len is None or name in args:
            return
        size = eval_len + _HEADROOM * (2 if metadata.get("chat_template") else 1)
        trained = trained_context(args.get("pretrained"))
        args[name] = min(size, trained) if trained else size
