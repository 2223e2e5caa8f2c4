"""Import and loading errors of the ExLlama packages as one line with the next step.

Both packages compile a CUDA extension at the first import, unless a wheel for the installed torch brings it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmeval_ext.errors import MissingEngineError, UserError, first_line
from lmeval_ext.models.exllama.config import text_config
from lmeval_ext.models.exllama.loading import Package
from lmeval_ext.models.exllama.memory import is_out_of_memory
from lmeval_ext.models.loading import explain_load

# Substrings of an import error in lower case, and what to do; the first row that matches counts. {package}, {cuda} and
# {version} (of torch) are filled in.
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
        "needed; or install the wheel of {package} that is built for torch {version}. LMEVAL_EXT_TRACEBACK=1 shows the "
        "compiler's messages",
    ),
    (
        ("undefined symbol", "cannot open shared object", "dll load failed"),
        "its compiled extension is for another torch than {version}: reinstall {package} for this one",
    ),
    (("no cuda device", "no nvidia driver"), "torch {version} sees no GPU; check the driver and CUDA_VISIBLE_DEVICES"),
)


def import_error(error: BaseException, package: Package) -> MissingEngineError:
    """Explains why an installed package cannot be imported."""
    if isinstance(error, MissingEngineError):
        return error
    text = f"{type(error).__name__}: {error}".lower()
    missing = isinstance(error, ModuleNotFoundError) and error.name not in (None, package.name)
    hint = f"pip install 'lmeval-ext[{package.extra}]'" if missing else "LMEVAL_EXT_TRACEBACK=1 shows where"
    for substrings, advice in _IMPORT_HINTS:
        if any(substring in text for substring in substrings):
            hint = advice.format(package=package.name, cuda=torch.version.cuda, version=torch.__version__)
            break
    return MissingEngineError(f"{package.name} cannot be imported ({first_line(error)}); {hint}")


# Substrings of a loading error in lower case, and what to do; the package's own (`Package.load_hints`) follow
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
    (("both `type` and `rope_type`",), 'remove "type" from rope_scaling in the checkpoint\'s config.json'),
)


def load_error(error: Exception, package: Package, folder: Path, config: dict[str, Any] | None = None) -> Exception:
    """Explains a loading error in one line. config: the checkpoint's config.json, if its width may be the cause."""
    if isinstance(error, UserError):
        return error
    text = f"{type(error).__name__}: {error}".lower()
    if is_out_of_memory(error) or "insufficient vram" in text or "insufficient space" in text:
        return UserError(
            f"{folder}: out of GPU memory while loading with {package.name}; lower max_length or cache_tokens (0: no "
            "cache, nothing can be generated), spread over GPUs with gpu_split=20/24, or take fewer bits per weight"
        )
    for substrings, hint in (*_LOAD_HINTS, *package.load_hints):
        if any(substring in text for substring in substrings):
            return explain_load(error, str(folder), hint.format(package=package.name))
    width, multiple = text_config(config or {}).get("hidden_size"), package.width_multiple
    if isinstance(width, int) and width % multiple:
        hint = (
            f"hidden_size={width} is not a multiple of {multiple}, which {package.name} needs; run this model with "
            "hf_quant"
        )
        return explain_load(error, str(folder), hint)
    return explain_load(error, str(folder), "LMEVAL_EXT_TRACEBACK=1 shows where")


def no_cache() -> UserError:
    """The error of a generation request to a model that was loaded without a KV cache."""
    return UserError("cache_tokens=0 leaves no KV cache to generate with; set it to 8192 or more")
