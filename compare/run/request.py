"""`RunRequest`: what one `compare run` was asked to do, as typed values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from compare.comparison.comparison import Options
from compare.write import PlotRequest


@dataclass(frozen=True)
class RunRequest:
    """What one `compare run` was asked to do; `compare.commands.run` builds it from the command line.

    models: names and globs of model specs. data: the data spec. tasks: harness tasks that replace those of the specs;
    empty: the specs' own. limit: windows or samples per task. mask: ``"A;B"``, only models whose label contains one of
    these strings.
    kld: measure the divergence from the reference and show it in the plot; fail where that is impossible.
    reference_folder: where the reference is stored, absolute; None: a folder in `results`.
    jobs: processes at a time. harness: the command that is the harness' CLI; None: `lm_eval` of this Python, or of each
    worker's Python on Ray. ray_address: the cluster; None: RAY_ADDRESS, or a cluster on this machine. gpu_gb: memory of
    one GPU of the cluster, in GiB.
    plot: how and where to draw the results, None for no plot; plot_options: what the plot shows.
    """

    models: tuple[str, ...]
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    limit: float | None = None
    log_samples: bool = False
    mask: str | None = None
    kld: bool = False
    reference_folder: Path | None = None
    results: Path = Path("results")
    clear_cache: bool = False
    dry_run: bool = False
    jobs: int = 1
    continue_on_error: bool = False
    launcher: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    gpu_gb: float | None = None
    harness: tuple[str, ...] | None = None
    plot: PlotRequest | None = None
    plot_options: Options = field(default_factory=Options)

    @property
    def divergence_flag(self) -> str:
        """The flag that asks for divergence, for messages: ``"-kld"``, ``"-lf"``, or empty where neither is given."""
        return "-kld" if self.kld else "-lf" if self.reference_folder else ""
