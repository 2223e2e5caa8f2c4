"""Builds samples of questions with several choices, as lm-eval 0.4.13 logs them, from the choices that models made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.compare.conftest import Content, Folder, sha
from tests.compare.divergence_files import write
from tests.compare.harness_files import suite

CHOICES = ("a", "bb", "cccc", "dddddddd")
TASK = "hellaswag"


def made_choices(
    seed: int, gold: np.ndarray, right: float, base: np.ndarray | None = None, changed: float = 0.0
) -> np.ndarray:
    """[questions] the number of the chosen answer.

    Without a base, `right` of them are right. With one, its choices, `changed` of which are drawn again.
    """
    rng = np.random.default_rng(seed)
    fresh = np.where(rng.random(len(gold)) < right, gold, (gold + rng.integers(1, 4, len(gold))) % 4)
    return fresh if base is None else np.where(rng.random(len(gold)) < changed, fresh, base)


def answer_lines(
    task: str, chosen: Sequence[int], gold: Sequence[int], *, metric: str = "acc", groups: Sequence[int] | None = None
) -> list[Content]:
    """One line per question. With ``metric="acc_norm"``, the largest log-likelihood per character is the chosen one."""
    lines = []
    for i, (choice, right) in enumerate(zip(chosen, gold, strict=True)):
        scale = [len(text) if metric == "acc_norm" else 1 for text in CHOICES]
        values = [-(1.0 if k == choice else 2.0 + k / 10) * scale[k] for k in range(len(CHOICES))]
        responses = [[str(value), "False"] for value in values]
        doc: dict[str, Any] = {"query": f"question {i}"}
        if groups is not None:
            doc["idx"] = {"paragraph": int(groups[i]), "question": i}
        lines.append({
            "doc_id": i, "doc": doc, "target": str(right),
            "arguments": {f"gen_args_{k}": {"arg_0": f"question {i}", "arg_1": f" {text}"}
                          for k, text in enumerate(CHOICES)},
            "resps": [[response] for response in responses], "filtered_resps": responses, "filter": "none",
            "metrics": [metric], metric: float(choice == right),
            "doc_hash": sha(f"{task} {i}"), "prompt_hash": sha(f"prompt {task} {i}"), "target_hash": sha(str(right)),
        })  # fmt: skip
    return lines


def write_answers(
    folder: Folder, label: str, chosen: np.ndarray, gold: np.ndarray, *, metric: str = "acc", task: str = TASK,
    groups: Sequence[int] | None = None, **keywords: Any,
) -> Path:  # fmt: skip
    """A result of one task and its samples."""
    content = suite(label, tasks=(task,), limit=len(gold), **keywords)
    content["results"][task][f"{metric},none"] = float((chosen == gold).mean())
    return write(
        folder, content, answer_lines(task, chosen.tolist(), gold.tolist(), metric=metric, groups=groups), task
    )


LADDER = (
    ("GGUF", "GGUF Q8_0", 8.5, 0.01), ("GGUF", "GGUF Q4_K_M", 4.85, 0.05), ("EXL3", "EXL3 5.0bpw", 5.03, 0.02),
    ("EXL3", "EXL3 3.0bpw", 3.03, 0.18), ("NVFP4", "NVFP4A16", 4.5, 0.08),
)  # fmt: skip


def fill(folder: Folder, questions: int = 1000) -> None:
    """A baseline and five quantized models that answer some questions otherwise."""
    gold = np.random.default_rng(0).integers(0, 4, questions)
    base = made_choices(1, gold, 0.7)
    write_answers(folder, "BF16", base, gold, family="full precision", bpw=16.0, scheme="bfloat16")
    for seed, (family, label, bpw, changed) in enumerate(LADDER, 2):
        own = made_choices(seed, gold, 0.7 - changed, base, changed)
        write_answers(folder, label, own, gold, family=family, bpw=bpw)
