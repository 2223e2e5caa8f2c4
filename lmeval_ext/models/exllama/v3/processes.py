"""Ends ExLlamaV3's tensor-parallel processes with the program. Tried with 1.6.5."""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import Any

logger = logging.getLogger(__name__)


def end_at_exit(model: Any) -> None:
    """Ends a model's processes before Python waits for them at exit, for ever: they do not end by themselves.

    ExLlamaV3 tries to do so at exit (`Cleanupper` in its util/misc.py), but after multiprocessing has begun to wait.
    Its `unload` knows of processes only if loading succeeded, hence `destroy_tp_context`, which `unload` calls, too.
    """
    reference = weakref.ref(model)

    def end() -> None:
        model = reference()
        if model is None:
            return
        children = list(model.mp_children)
        try:
            model.unload()
            if model.mp_children:
                model.destroy_tp_context()
        except Exception:
            logger.exception("ExLlamaV3's processes did not end in order")
            for child in children:
                if hasattr(child, "terminate"):  # one is a stand-in, for this process
                    child.terminate()

    atexit.register(end)  # the last to be registered runs first: before multiprocessing's own
