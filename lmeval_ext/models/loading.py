"""Finds and names a checkpoint, and explains why it does not load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmeval_ext.errors import UserError, first_line
from lmeval_ext.storage import StorageError, inspect


def explain_load(error: Exception, pretrained: Any, hint: str = "") -> UserError:
    """Turns a loading error into one line; damage that the checkpoint's headers show comes first.

    The caller chains the engine's own error to it; LMEVAL_EXT_TRACEBACK=1 shows both.
    """
    if isinstance(error, UserError):
        return error
    path = local_checkpoint(pretrained)
    if path is not None:
        try:
            inspect(path)
        except StorageError as reason:
            return UserError(str(reason))
        except OSError:
            pass
    what = f"{pretrained!r}" if isinstance(pretrained, str) else type(pretrained).__name__
    hint = hint or "LMEVAL_EXT_TRACEBACK=1 shows where"
    return UserError(f"pretrained={what} could not be loaded ({type(error).__name__}: {first_line(error)}); {hint}")


def local_checkpoint(pretrained: Any, revision: str | None = None) -> str | None:
    """Path of `pretrained`: itself, or the hub's snapshot in the local cache. None if neither exists."""
    if not isinstance(pretrained, str):
        return None
    if Path(pretrained).exists():
        return pretrained
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(pretrained, revision=revision, local_files_only=True))
    except Exception:
        return None


def default_label(pretrained: Any) -> str:
    """The checkpoint's own name, for a model without `label=`."""
    return Path(pretrained).resolve().name if isinstance(pretrained, str) else type(pretrained).__name__
