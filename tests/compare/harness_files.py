"""Builds result files of the harness' own tasks, with the structure of lm-eval 0.4.13.

The structure is checked against a file that lm-eval wrote, in comparison/test_chosen_metric.py: a nested group without
n-samples, n-shot and higher_is_better, filters, two metrics of a task.
"""

from __future__ import annotations

import math
from typing import Any

from tests.compare.conftest import Content, quantization

SUBTASKS = {
    "mmlu_stem": ("abstract_algebra", "anatomy", "astronomy"),
    "mmlu_other": ("business_ethics", "virology"),
    "mmlu_social_sciences": ("econometrics", "sociology"),
    "mmlu_humanities": ("philosophy", "world_religions"),
}
SIZES = (100, 135, 152, 100, 166, 114, 201, 311, 171)
ORIGINAL = {"gsm8k": 1319, "hellaswag": 10042, "wikitext": 62}


def binomial(share: float, count: int) -> float:
    """Standard error of a share of `count` samples, as in the harness' mean_stderr."""
    return math.sqrt(share * (1 - share) / (count - 1))


def suite(
    label: str = "model",
    family: str = "GGUF",
    bpw: float | None = 4.85,
    quality: float = 1.0,
    *,
    tasks: tuple[str, ...] = ("mmlu", "gsm8k", "hellaswag", "wikitext"),
    limit: int | None = None,
    **changes: Any,
) -> Content:
    """One run of several tasks. quality: 1 is full precision; lower values worsen every figure."""
    content: Content = {
        "results": {}, "groups": {}, "group_subtasks": {}, "configs": {}, "versions": {}, "n-shot": {},
        "higher_is_better": {}, "n-samples": {},
        "config": {
            "model": "vllm_nvfp4",
            "model_args": {"pretrained": f"models/{label.replace(' ', '-')}", "max_length": 4096},
            "limit": limit,
            "gen_kwargs": {},
            "quantization": quantization(label, family, changes.pop("scheme", label), bpw, **changes),
        },
        "date": 1_790_000_000.0,
        "chat_template": None,
        "lm_eval_version": "0.4.13",
    }  # fmt: skip
    for task in tasks:
        _ADD[task](content, quality, limit)
    if not content["groups"]:
        del content["groups"]
    return content


def _task(content: Content, name: str, figures: Content, higher: Content, count: int, **facts: Any) -> None:
    content["results"][name] = {"name": name, "alias": facts.get("alias", name), "sample_len": count, **figures}
    content["configs"][name] = {
        "task": name, "output_type": facts.get("output_type", "multiple_choice"), "metadata": {"version": 1.0},
    }  # fmt: skip
    content["versions"][name] = facts.get("version", 1.0)
    content["n-shot"][name] = facts.get("shots", 0)
    content["higher_is_better"][name] = higher
    content["n-samples"][name] = {"original": facts.get("original", count), "effective": count}


def _group(content: Content, name: str, children: list[str], leaves: list[str], propagated: bool, alias: str) -> None:
    """Adds a group by the harness' formulas (lm_eval/api/metrics.py): size-weighted mean, pooled standard error."""
    results = [content["results"][leaf] for leaf in leaves]
    sizes = [result["sample_len"] for result in results]
    total = sum(sizes)
    value = sum(r["acc,none"] * n for r, n in zip(results, sizes, strict=True)) / total
    pooled = sum((n - 1) * n * r["acc_stderr,none"] ** 2 for r, n in zip(results, sizes, strict=True))
    content["results"][name] = {
        "alias": alias,
        "name": name,
        "sample_len": total,
        "acc,none": value,
        "acc_stderr,none": math.sqrt(pooled / (total - len(sizes)) / total),
        "sample_count": {"acc,none": total},
    }
    content["groups"][name] = content["results"][name]
    content["versions"][name] = "2"
    content["group_subtasks"][name] = children
    if propagated:
        content["higher_is_better"][name] = {"acc": True}
        content["n-shot"][name] = 5


def _mmlu(content: Content, quality: float, limit: int | None) -> None:
    number, everything = 0, []
    for group, leaves in SUBTASKS.items():
        for leaf in leaves:
            count = min(SIZES[number], limit or SIZES[number])
            share = round((0.25 + quality * (0.22 + 0.04 * (number % 4))) * count) / count
            figures = {"acc,none": share, "acc_stderr,none": binomial(share, count)}
            _task(content, f"mmlu_{leaf}", figures, {"acc": True}, count, alias=leaf, shots=5, original=SIZES[number])
            number += 1
        names = [f"mmlu_{leaf}" for leaf in leaves]
        _group(content, group, names, names, True, f" - {group.removeprefix('mmlu_')}")  # as before lm-eval 0.4.9
        everything += names
    _group(content, "mmlu", list(SUBTASKS), everything, False, "mmlu")


def _gsm8k(content: Content, quality: float, limit: int | None) -> None:
    count = min(limit or 1319, 1319)
    figures: Content = {}
    for filter_name, share in (("strict-match", 0.55 * quality**3), ("flexible-extract", 0.58 * quality**3)):
        figures[f"exact_match,{filter_name}"] = share
        figures[f"exact_match_stderr,{filter_name}"] = binomial(share, count)
    _task(content, "gsm8k", figures, {"exact_match": True}, count, version=3.0, shots=5, original=1319,
          output_type="generate_until")  # fmt: skip


def _hellaswag(content: Content, quality: float, limit: int | None) -> None:
    count = min(limit or 10042, 10042)
    acc, norm = 0.3 + 0.28 * quality, 0.35 + 0.4 * quality
    figures = {"acc,none": acc, "acc_stderr,none": binomial(acc, count),
               "acc_norm,none": norm, "acc_norm_stderr,none": binomial(norm, count)}  # fmt: skip
    _task(content, "hellaswag", figures, {"acc": True, "acc_norm": True}, count, original=10042)


def _wikitext(content: Content, quality: float, limit: int | None) -> None:
    figures = {"word_perplexity,none": 9.5 / quality, "word_perplexity_stderr,none": "N/A",
               "bits_per_byte,none": 0.61 / quality, "bits_per_byte_stderr,none": "N/A"}  # fmt: skip
    _task(content, "wikitext", figures, {"word_perplexity": False, "bits_per_byte": False}, limit or 62,
          version=2.0, original=62, output_type="loglikelihood_rolling")  # fmt: skip


_ADD = {"mmlu": _mmlu, "gsm8k": _gsm8k, "hellaswag": _hellaswag, "wikitext": _wikitext}

LADDER = (
    ("EXL3", 3.03, 0.94), ("EXL3", 4.03, 0.985), ("EXL3", 5.03, 0.995),
    ("GGUF", 3.72, 0.93), ("GGUF", 4.79, 0.98), ("GGUF", 6.56, 0.997), ("NVFP4", 4.5, 0.965),
)  # fmt: skip


def fill(folder: Any, **more: Any) -> None:
    """Adds the baseline and seven quantized models, each evaluated on all tasks."""
    folder.write(suite("BF16", "full precision", 16.0, 1.0, scheme="bfloat16", **more))
    for family, bpw, quality in LADDER:
        folder.write(suite(f"{family} {bpw:.1f}bpw", family, bpw, quality, **more))
