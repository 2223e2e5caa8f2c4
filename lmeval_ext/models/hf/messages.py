"""Loading errors of Transformers, as one line that ends with the next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from lmeval_ext.errors import MissingEngineError, UserError, first_line
from lmeval_ext.models.hf.methods import REFUSED, method_in, what_is_needed
from lmeval_ext.models.loading import explain_load, local_checkpoint


def explain(error: Exception, pretrained: Any, tokenizer: Any = None) -> Exception:
    """Turns a loading error into one that names the user's next step."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return UserError(
            f"pretrained={pretrained!r}: out of GPU memory while loading; use dtype=float16, device=cpu, or "
            "parallelize=True over several GPUs"
        )
    if isinstance(error, UserError):
        return error
    path = local_checkpoint(pretrained)
    method = method_in(Path(path)) if path is not None else None
    needed = what_is_needed(method) if method is not None else None
    if needed:
        if method in REFUSED:
            return UserError(f"pretrained={pretrained!r}: {needed} ({type(error).__name__}: {first_line(error)})")
        return MissingEngineError(f"pretrained={pretrained!r}: {needed}")
    if isinstance(error, ImportError):
        return MissingEngineError(
            f"pretrained={pretrained!r} needs a package that is not installed: {first_line(error)}"
        )
    if missing := what_is_missing(pretrained, tokenizer):
        return UserError(missing)
    if "Unknown quantization type" in text:
        return UserError(
            f"pretrained={pretrained!r}: Transformers {transformers.__version__} does not know quant_method "
            f"{method!r}, and it is not decoded here; run it with its own engine"
        )
    if "trust_remote_code" in text:
        return explain_load(error, pretrained, "if you trust the code in that folder, add trust_remote_code=True")
    if "Unrecognized configuration class" in text and path is not None:
        return explain_load(error, pretrained, _other_class(path))
    if "model type" in text or "Unrecognized" in text:
        return explain_load(error, pretrained, "this Transformers does not know the model")
    if isinstance(error, OSError):
        hint = "give a checkpoint folder with config.json and safetensors weights, or a hub id that can be reached"
        return explain_load(error, pretrained, hint)
    return explain_load(error, pretrained)


# Kinds of models beside causal ones, and the argument that loads them
_OTHER_CLASSES = {
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "it also sees pictures: add multimodal=True, which runs its text part",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING": "it is an encoder and a decoder: add backend=seq2seq",
}


def _other_class(path: str) -> str:
    """The next step for a checkpoint whose config Transformers knows, but not as a causal model."""
    config = transformers.AutoConfig.from_pretrained(path)
    for mapping, step in _OTHER_CLASSES.items():
        if type(config) in getattr(transformers, mapping, {}):
            return step
    return f"Transformers {transformers.__version__} has no class that runs {config.model_type} models on text alone"


# Any one of these files is a tokenizer; those in JSON can be checked.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model",
)  # fmt: skip


def what_is_missing(pretrained: Any, tokenizer: Any = None) -> str | None:
    """Explains why a local checkpoint folder cannot be loaded, if its small files show it; None otherwise.

    tokenizer: the argument of that name; with one, the folder needs no tokenizer of its own.
    """
    folder = Path(pretrained) if isinstance(pretrained, str) else None
    if folder is None or not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        return f"pretrained={pretrained!r}: no config.json there; copy it from the place the weights come from"
    if tokenizer:
        return None
    tokenizers = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not tokenizers:
        return (
            f"pretrained={pretrained!r}: no tokenizer there ({', '.join(_TOKENIZERS[:2])}, …); copy it from the "
            "original model, or name one with tokenizer="
        )
    for path in (*tokenizers, folder / "tokenizer_config.json"):
        if path.suffix == ".json" and path.is_file():
            try:
                json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                reason = " ".join(str(error).split())
                return f"{path} is not valid JSON ({reason}); download the file again"
            except OSError as error:
                return f"{path} cannot be read ({error.strerror}); check its permissions"
    return None
