"""What both engines do before and after they load a checkpoint: find it, parse arguments, check the GPU, try a forward.

Tried with exllamav2 0.3.2 and exllamav3 1.6.5.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmeval_ext.errors import MissingEngineError, UserError, first_line
from lmeval_ext.models.exllama.engine import Engine
from lmeval_ext.models.loading import local_checkpoint

_NOT_READ = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.msgpack", "*.h5"]  # weights that neither engine reads


@dataclass(frozen=True)
class Package:
    """Facts about an engine's Python package that checks and messages need.

    name: the package's name. extra: the extra of lmeval-ext that installs it. compute_capability: the lowest that its
    kernels run on, (8, 0) for Ampere. width_multiple: a model's hidden size must be a multiple of it. load_hints:
    substrings of the package's own loading errors, in lower case, and what to do about them.
    """

    name: str
    extra: str
    compute_capability: tuple[int, int]
    width_multiple: int = 1
    load_hints: tuple[tuple[tuple[str, ...], str], ...] = ()


# ---------------------------------------------------------------------- the package and the GPU


def require(package: Package) -> None:
    """Raises MissingEngineError if the package cannot work; called before its import, which may compile for minutes."""
    if importlib.util.find_spec(package.name) is None:
        raise MissingEngineError(
            f"{package.name} is not installed; install it with pip install 'lmeval-ext[{package.extra}]'"
        )
    if not torch.cuda.is_available():
        raise MissingEngineError(
            f"{package.name} needs a GPU, and torch {torch.__version__} sees none; check the driver, "
            "CUDA_VISIBLE_DEVICES and that torch is a CUDA build. (EXL2 and EXL3 checkpoints run on any machine "
            "through hf_quant)"
        )


def check_gpu(package: Package, index: int | None) -> None:
    """Raises UserError if a GPU is older than the package's kernels. index: the one GPU; None: all are checked."""
    for device in range(torch.cuda.device_count()) if index is None else [index]:
        capability = torch.cuda.get_device_capability(device)
        if torch.version.cuda and capability < package.compute_capability:
            raise UserError(
                f"{torch.cuda.get_device_name(device)} (cuda:{device}) has compute capability {capability[0]}."
                f"{capability[1]}, {package.name} needs {package.compute_capability[0]}."
                f"{package.compute_capability[1]} or newer; hf_quant runs EXL2 and EXL3 checkpoints on any machine"
            )


def try_forward(engine: Engine) -> None:
    """Runs one forward of 32 tokens, so that a model that cannot run fails now and not at the first request."""
    with torch.inference_mode():
        engine.logits(engine.hidden(torch.zeros((1, 32), dtype=torch.int64), 1)[0]).sum().item()


# ---------------------------------------------------------------------- arguments


def find_checkpoint(pretrained: str, revision: str | None = None) -> Path:
    """Returns the checkpoint's folder: `pretrained` itself, or the hub's snapshot, downloaded if needed.

    Raises UserError if there is none.
    """
    path = local_checkpoint(pretrained, revision)
    if path is None:
        try:
            from huggingface_hub import snapshot_download

            path = str(snapshot_download(pretrained, revision=revision, ignore_patterns=_NOT_READ))
        except Exception as error:
            raise UserError(
                f"pretrained={pretrained!r}: no such folder, and no model of the hub that can be reached "
                f"({first_line(error)})"
            ) from error
    folder = Path(path)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise UserError(f"pretrained={pretrained!r}: no config.json there; give a folder with safetensors weights")
    return folder


def check_unknown(package: Package, arguments: dict[str, Any]) -> None:
    """Raises UserError for an argument that neither the adapter nor the engine has."""
    for name, value in arguments.items():
        raise UserError(f"{name}={value!r} is not an argument of {package.name}; docs/exllama.md lists them")


def single_device(device: str | None, split: Sequence[float] | None, tensor_parallel: bool) -> int | None:
    """Returns the index of the one GPU to load on; None to spread over all.

    cuda:0 together with gpu_split or tensor_parallel is not a contradiction: the harness' command line passes it by
    default (lm_eval.config.evaluate_config, 0.4.13). Raises UserError for a CPU, or for another GPU together with them.
    """
    index: int | None = None
    if device is not None:
        try:
            parsed = torch.device(device)
        except RuntimeError as error:
            raise UserError(f"device={device!r}: expected cuda or cuda:0") from error
        if parsed.type != "cuda":
            raise UserError(f"device={device!r}: ExLlama runs on GPUs only; hf_quant takes these checkpoints anywhere")
        index = parsed.index
    if split or tensor_parallel:
        if index not in (None, 0):
            raise UserError(
                f"device={device!r} names one GPU, but gpu_split and tensor_parallel spread over several; give one of "
                "them"
            )
        return None
    if index is not None and index >= torch.cuda.device_count():
        raise UserError(f"device={device!r}: this process sees {torch.cuda.device_count()} GPU(s)")
    if index is None and torch.cuda.device_count() == 1:
        index = 0
    return index


def numbers(name: str, value: Any) -> list[float] | None:
    """Parses a list of numbers: `gpu_split=20/24`, `[20, 24]`, "20,24" or 20; None and "auto" give None.

    A comma would end the argument in --model_args, so `/`, `+` and `:` separate, too. Raises UserError for other texts.
    """
    if value is None or value == "auto":
        return None
    try:
        return [float(part) for part in _parts(value)]
    except ValueError:
        raise UserError(f"{name}={value!r}: expected numbers such as 20/24") from None


def parse_cache_bits(value: Any, allowed: Sequence[int]) -> tuple[int, int] | None:
    """Parses the bits of keys and values in the KV cache: 4, "q4", "8/4" (keys/values); None for fp16.

    Raises UserError for bits that are not in `allowed`.
    """
    if value is None or str(value).lower() in ("", "16", "fp16", "float16", "none"):
        return None
    bits = [str(part).lower().removeprefix("q") for part in _parts(value)]
    if len(bits) not in (1, 2) or any(not b.isdigit() or int(b) not in allowed for b in bits):
        raise UserError(
            f"cache_bits={value!r}: expected {', '.join(map(str, allowed))} or fp16 (keys and values apart: 8/4)"
        )
    return int(bits[0]), int(bits[-1])


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else re.split(r"[,/+:\s]+", str(value))
