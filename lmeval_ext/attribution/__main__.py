"""``python -m lmeval_ext.attribution``: measures the parts of a quantized checkpoint and writes one JSON file.

``compare attribute`` starts it, and makes the table and the plot from the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmeval_ext.attribution.parts import GROUPINGS, parts_of
from lmeval_ext.errors import UserError, install_excepthook
from lmeval_ext.files import write_atomically

FORMAT, VERSION = "lmeval-ext attribution", 1


def main(arguments: Sequence[str] | None = None) -> int:
    install_excepthook()
    options = _parser().parse_args(arguments)
    try:
        metadata = json.loads(options.metadata)
    except ValueError as error:
        raise UserError(f"--metadata {options.metadata}: expected JSON: {error}") from None
    content = measure(options, metadata)
    write_atomically(options.output, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmeval_ext.attribution", description=__doc__)
    parser.add_argument("--original", required=True, help="the unquantized checkpoint, which wrote the reference")
    parser.add_argument("--quantized", required=True, help="the quantized checkpoint of the same model")
    parser.add_argument("--reference", required=True, help="folder of the reference (save_reference=)")
    parser.add_argument("--task", default="wiki2_strided", help="task whose windows the reference has")
    parser.add_argument("--metadata", default="{}", help="JSON: the task's settings, as in lm_eval --metadata")
    parser.add_argument("--limit", type=int, help="measure the first windows only")
    parser.add_argument("--by", choices=GROUPINGS, default="matrix")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--batch-size", default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser


def measure(options: argparse.Namespace, metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of the file. Raises UserError for checkpoints, references and tasks that do not fit together."""
    from lmeval_ext.attribution.measure import attribute
    from lmeval_ext.attribution.weights import changed_matrices
    from lmeval_ext.divergence.store import ReferenceStore
    from lmeval_ext.models.hf.adapter import HFQuantized
    from lmeval_ext.models.loading import default_label

    manifest = ReferenceStore.open(options.reference).manifest
    common = {"dtype": options.dtype, "device": options.device}
    quantized = HFQuantized(pretrained=options.quantized, **common)
    facts = quantized.describe()
    original = HFQuantized(
        pretrained=options.original, batch_size=options.batch_size, reference=options.reference, **common
    )
    weights = changed_matrices(original.model, quantized.model, default_label(options.quantized))
    del quantized
    task = _task(options.task, {"pretrained": options.original, **metadata})
    task.build_all_requests(limit=options.limit, rank=0, world_size=1)
    parts = parts_of(weights, options.by)
    found = attribute(original, weights, parts, task.instances, task.spec.block_windows)
    record = task.dump_config()["metadata"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "original": default_label(options.original),
        "quantized": {"label": facts.label, "family": facts.family, "scheme": facts.scheme,
                      "layer_bpw": facts.layer_bpw, "weights": "dense, activations not quantized"},
        "reference": {"id": manifest.id, "label": manifest.model.get("label")},
        "task": options.task,
        "tokens_sha256": record["tokens_sha256"],
        "windows": record["windows"],
        "scored_tokens": record["scored_tokens"],
        "by": options.by,
        "base": vars(found.base),
        "whole": vars(found.whole),
        "additivity": found.additivity,
        "parts": [
            {"name": part.name, "layer": part.layer, "kind": part.kind, "matrices": len(part.matrices),
             "weights": sum(weights[name].numel() for name in part.matrices), **vars(cost)}
            for part, cost in zip(parts, found.parts, strict=True)
        ],
    }  # fmt: skip


def _task(name: str, metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    from lmeval_ext._register import TASKS

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    if name not in manager.all_tasks:
        ours = ", ".join(sorted(manager.all_tasks))
        raise UserError(f"--task {name}: expected a task of token windows, one of: {ours}")
    return manager.load([name])["tasks"][name]


if __name__ == "__main__":
    sys.exit(main())
