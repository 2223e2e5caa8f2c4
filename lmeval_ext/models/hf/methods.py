"""What each quantization method needs to run in Transformers: packages and the extra that installs them, or why not.

Names of packages are those of imports. Tested with transformers 5.19 and 5.24; docs/formats.md has the versions.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lmeval_ext.storage import StorageError
from lmeval_ext.storage.checkpoint import read_config
from lmeval_ext.storage.schemes import method_of


class Needs(NamedTuple):
    """One row: packages that Transformers imports for a method, and the extra of this project that installs them."""

    packages: tuple[str, ...]
    extra: str


NEEDS: dict[str, Needs] = {
    "awq": Needs(("gptqmodel", "accelerate"), "awq"),
    "gptq": Needs(("gptqmodel", "optimum"), "gptq"),
    "auto-round": Needs(("auto_round",), "autoround"),
    "bitsandbytes": Needs(("bitsandbytes", "accelerate"), "bnb"),
    "compressed-tensors": Needs(("compressed_tensors",), "quant"),
    "fp8": Needs(("accelerate",), "quant"),
    "mxfp8": Needs(("accelerate",), "quant"),
    "mxfp4": Needs(("accelerate",), "quant"),
    "bitnet": Needs(("accelerate",), "quant"),
}

_CUDA = "runs on CUDA alone, through a package of its own, which was not tried here"
# Methods that Transformers may know, and that are not run here without a GPU and the method's own package
REFUSED: dict[str, str] = {
    "spqr": _CUDA,
    "higgs": _CUDA,
    "fp_quant": _CUDA,
    "eetq": _CUDA,
    "fbgemm_fp8": _CUDA,
    "fouroversix": _CUDA,
    "nvfp4": "is quantized at load, on a Blackwell GPU; Transformers reads no such checkpoint",
    "quark": "needs AMD's own package, which was not tried here; for FP8 and MXFP4 models of it use vllm_nvfp4",
    "sinq": "needs a package of its own, which was not tried here",
    "metal": "runs on Apple's GPUs alone",
    "quip": "is not decoded here, and Transformers does not know it",
}


def method_in(folder: Path) -> str | None:
    """The quantization method of a checkpoint folder; None for a dense one, or if config.json cannot be read."""
    try:
        return method_of(read_config(folder).quantization)
    except (StorageError, OSError):
        return None


def what_is_needed(method: str) -> str | None:
    """Why a checkpoint of this method does not run, if that is known: missing packages, or a refusal."""
    if method in REFUSED:
        return f"quant_method {method!r} {REFUSED[method]}"
    needs = NEEDS.get(method)
    missing = [name for name in needs.packages if find_spec(name) is None] if needs else []
    if needs and missing:
        packages = " and ".join(missing).replace("_", "-")
        return f"{method} checkpoints need {packages}: pip install 'lmeval-ext[{needs.extra}]'"
    return None
