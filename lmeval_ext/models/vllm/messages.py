"""vLLM's loading errors, as one line that ends with the next step."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lmeval_ext.errors import UserError, first_line
from lmeval_ext.models.loading import explain_load


def check_checkpoint(pretrained: str, load_format: str | None = None) -> None:
    """Raises UserError for a path that is not a checkpoint folder, or a folder without weights; hub ids pass.

    load_format: vLLM's argument. Formats other than the usual ones may have other files, or none.
    """
    path = Path(pretrained).expanduser()
    looks_local = path.is_absolute() or pretrained.startswith((".", "~")) or path.exists()
    if looks_local and not (path / "config.json").is_file():
        raise UserError(
            f"pretrained={pretrained!r}: no config.json there; give a checkpoint folder (config.json, safetensors, "
            "tokenizer files) or a hub id"
        )
    usual = load_format in (None, "auto", "hf", "safetensors", "pt")
    if looks_local and usual and not any(file.suffix in _WEIGHTS for file in path.iterdir()):
        raise UserError(
            f"pretrained={pretrained!r}: no weights there (expected *.safetensors beside config.json); complete the "
            "folder"
        )


_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}  # that vLLM reads


# Substrings of vLLM's messages (0.26–0.32), and the user's next step.
_HINTS = (
    (("No available memory for the cache blocks",), "raise gpu_memory_utilization or lower max_model_len"),
    (("estimated maximum model length", "larger than the available KV cache"), "lower max_model_len"),
    (("out of memory", "OutOfMemoryError"), "lower gpu_memory_utilization, max_model_len or max_num_seqs"),
    (("less than desired GPU memory utilization", "Free memory on device"), "lower gpu_memory_utilization"),
    (("is greater than the derived max_model_len",), "lower max_model_len, or eval_len of the task"),
    (("Cannot find any model weights",), "the folder needs *.safetensors files"),
    (("Unknown quantization method", "not supported for", "Failed to find a kernel", "Forced NVFP4 kernel"),
     "this vLLM cannot run the format on this machine; try --model hf_quant"),
    (("are not supported for now", "no module or parameter named"), "this vLLM does not know the model; try hf_quant"),
    (("Can't load the configuration", "not a valid model identifier", "couldn't connect", "Repo id must be",
      "cannot find the requested files", "LocalEntryNotFound", "offline mode is enabled"),
     "give a checkpoint folder or a hub id that can be reached"),
    (("does not recognize this architecture",), "this vLLM's Transformers does not know the model"),
    (("Engine core initialization failed",),
     "the engine's own error is printed above; if it is about memory, lower max_model_len or gpu_memory_utilization"),
)  # fmt: skip


def explain(error: Exception, pretrained: str) -> Exception:
    """Turns vLLM's error into one line that ends with the user's next step."""
    text = str(error)
    if "failed to be inspected" in text and find_spec("torchvision") is None:  # the cause is in vLLM's log alone
        return UserError(
            f"pretrained={pretrained!r}: vLLM could not import its code for this architecture, and torchvision is not "
            "installed, which its multimodal models import even for text; install the torchvision built for this "
            "torch, or run --model hf_quant"
        )
    for needles, hint in _HINTS:
        if any(needle in text for needle in needles) and not isinstance(error, UserError):
            line = next((x for x in text.splitlines() if any(n in x for n in needles)), first_line(error))
            return UserError(f"pretrained={pretrained!r}: {line.strip()}; {hint}")
    first, *others = text.splitlines() or [""]
    if "validation error" in first and others:  # pydantic's first line says only how many there are
        said = [line.split(" [type=")[0].strip().removeprefix("Value error, ") for line in others]
        reason = ": ".join(line for line in said if line and not line.startswith("For further information"))
        return UserError(f"pretrained={pretrained!r} could not be loaded: {reason}; correct the argument or the file")
    return explain_load(error, pretrained)
