"""ExLlama's traps as one line each: what stands in the way of the first import, of loading, of this GPU.

Both packages compile a CUDA extension at the first import, unless a wheel for the installed torch brings it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from lmeval_ext.errors import MissingEngineError, UserError, first_line
from lmeval_ext.models.exllama.config import text_config
from lmeval_ext.models.exllama.memory import is_out_of_memory
from lmeval_ext.models.loading import explain_load

# words of the error -> what to do; the first row that matches. {package}, {cuda} and {version} are filled in.
_IMPORT_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("cuda_home", "cuda toolkit", "nvcc", "cuda install root"),
        "no CUDA toolkit was found, and {package} compiles its extension at the first import: install the toolkit for "
        "CUDA {cuda} (nvcc) and set CUDA_HOME, or install the wheel of {package} that is built for torch {version}",
    ),
    (
        ("ninja",),
        "{package} compiles its extension at the first import and needs ninja: pip install ninja",
    ),
    (
        ("error building extension", "error compiling", "c++ compiler", "command 'c++'", "no module named 'distutils'"),
        "its extension does not compile here: a C++ compiler (g++), Python's headers and a CUDA toolkit {cuda} are "
        "needed; or install the wheel of {package} that is built for torch {version}. The compiler's own words: "
        "LMEVAL_EXT_TRACEBACK=1",
    ),
    (
        ("undefined symbol", "cannot open shared object", "dll load failed"),
        "its compiled extension is for another torch than {version}: reinstall {package} for this one",
    ),
    (("no cuda device", "no nvidia driver"), "torch {version} sees no GPU; check the driver and CUDA_VISIBLE_DEVICES"),
)


def require(package: str, extra: str) -> None:
    """Raises MissingEngineError where `package` cannot work, before its import starts to compile anything."""
    if importlib.util.find_spec(package) is None:
        raise MissingEngineError(f"{package} is not installed; install it with pip install 'lmeval-ext[{extra}]'")
    if not torch.cuda.is_available():
        raise MissingEngineError(
            f"{package} needs a GPU, and torch {torch.__version__} sees none; check the driver, CUDA_VISIBLE_DEVICES "
            "and that torch is a CUDA build. (EXL2 and EXL3 checkpoints run on any machine through hf_quant)"
        )


def import_error(error: BaseException, package: str, extra: str) -> MissingEngineError:
    """What the import of an installed engine died of, and what helps."""
    if isinstance(error, MissingEngineError):
        return error
    text = f"{type(error).__name__}: {error}".lower()
    missing = isinstance(error, ModuleNotFoundError) and error.name not in (None, package)
    hint = f"pip install 'lmeval-ext[{extra}]'" if missing else "LMEVAL_EXT_TRACEBACK=1 shows where"
    for words, advice in _IMPORT_HINTS:
        if any(word in text for word in words):
            hint = advice.format(package=package, cuda=torch.version.cuda, version=torch.__version__)
            break
    return MissingEngineError(f"{package} cannot be imported ({first_line(error)}); {hint}")


def check_gpu(package: str, least: tuple[int, int], devices: list[int]) -> None:
    """Raises UserError where a GPU is older than the engine's kernels.

    least: compute capability, (8, 0) for Ampere.
    """
    for index in devices:
        capability = torch.cuda.get_device_capability(index)
        if torch.version.cuda and capability < least:
            has, needs = (".".join(map(str, c)) for c in (capability, least))
            raise UserError(
                f"{torch.cuda.get_device_name(index)} (cuda:{index}) has compute capability {has}, {package} needs "
                f"{needs} or newer; hf_quant runs EXL2 and EXL3 checkpoints on any machine"
            )


# words of the error -> what to do, while loading
_LOAD_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("unknown architecture", "unexpected architecture", "multiple architectures"),
        "{package} does not know this architecture; convert the model for another engine",
    ),
    (
        ("no kernel image", "not compiled for", "invalid device function"),
        "the extension was compiled for other GPUs than this one: remove the compiled extension and import it anew",
    ),
    (("could not find", "not found in", "no .safetensors", "missing tensor"), "weights are missing; download it again"),
    (
        ("quantized cache must be", "cache size must be", "multiple of 256"),
        "cache_bits is 2 to 8, cache_tokens a multiple of 256",
    ),
    (("both `type` and `rope_type`",), 'remove "type" from rope_scaling in the checkpoint\'s config.json'),
)


def load_error(
    error: Exception, package: str, folder: Path, config: dict[str, Any] | None = None, multiple: int = 1
) -> Exception:
    """What loading died of, as one line.

    multiple: what the engine's kernels need the hidden size to be a multiple of.
    """
    if isinstance(error, UserError):
        return error
    text = f"{type(error).__name__}: {error}".lower()
    if is_out_of_memory(error) or "insufficient vram" in text or "insufficient space" in text:
        return UserError(
            f"{folder}: out of GPU memory while loading with {package}; lower max_length or cache_tokens (0: no cache, "
            "nothing can be generated), spread over GPUs with gpu_split=20/24, or take fewer bits per weight"
        )
    for words, hint in _LOAD_HINTS:
        if any(word in text for word in words):
            return explain_load(error, str(folder), hint)
    width = text_config(config or {}).get("hidden_size")
    if isinstance(width, int) and width % multiple:
        hint = f"hidden_size={width} is no multiple of {multiple}, which {package} needs; run this model with hf_quant"
        return explain_load(error, str(folder), hint)
    return explain_load(error, str(folder), "LMEVAL_EXT_TRACEBACK=1 shows where")


def check_unknown(arguments: dict[str, Any], engine: str) -> None:
    """Raises UserError for an argument that neither the adapter nor the engine has."""
    for name, value in arguments.items():
        raise UserError(f"{name}={value!r} is no argument of {engine}; docs/exllama.md lists them")


def single_device(device: str | None, split: list[float] | None, tensor_parallel: bool) -> int | None:
    """Index of the one GPU to load on; None to spread. UserError for a CPU, or two wishes that exclude each other.

    cuda:0 beside a wish to spread is no second wish: the harness' command line says it where nobody has asked for a
    device (lm_eval.config.evaluate_config, 0.4.13).
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
            raise UserError(f"device={device!r} names one GPU, gpu_split and tensor_parallel spread; give one of them")
        return None
    if index is not None and index >= torch.cuda.device_count():
        raise UserError(f"device={device!r}: this process sees {torch.cuda.device_count()} GPU(s)")
    if index is None and torch.cuda.device_count() == 1:
        index = 0
    return index
