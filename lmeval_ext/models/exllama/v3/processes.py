"""ExLlamaV3's processes in tensor parallel, and their end. Tried with 1.6.5."""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import Any

logger = logging.getLogger(__name__)


def end_at_exit(model: Any) -> None:
    """End a model's processes before Python waits for them to end by themselves, which they never do.

    ExLlamaV3 means to do so at exit (`Cleanupper` in its util/misc.py), but after multiprocessing has begun to wait.
    Its `unload` knows of processes only where loading went well, hence `destroy_tp_context`, which `unload` calls too.
    """
    still_there = weakref.ref(model)

    def end() -> None:
        found = still_there()
        if found is None:
            return
        children = list(found.mp_children)
        try:
            found.unload()
            if found.mp_children:
                found.destroy_tp_context()
        except Exception:
            logger.exception("ExLlamaV3's processes did not end in order")
            for child in children:
                if hasattr(child, "terminate"):  # one is a stand-in, for this process
                    child.terminate()

    atexit.register(end)  # the last to be registered is the first to run: before multiprocessing's own
