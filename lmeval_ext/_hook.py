"""Adds our models and tasks to the unmodified `lm_eval`.

lm-eval 0.4.13 has no plug-in discovery, so the one line of `lmeval_ext_hook.pth`, which Python runs at every start,
puts a finder on `sys.meta_path`. The finder's code is written out in that line, because importing anything from
site-packages would cost more than the line itself. When one of two harness modules is imported, the finder calls
`find_spec` here, which finds the module as usual and adds one step after the module's own code: a function of
`lmeval_ext._register`. `LMEVAL_EXT_DISABLE=1` switches all of it off.

Without an installed package, `import lmeval_ext._hook; lmeval_ext._hook.install()` before `lm_eval` does the same.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# Harness module and the function of lmeval_ext._register that is called with it after its import
_ACTIONS = {"lm_eval.models": "register_models", "lm_eval.tasks.manager": "register_tasks"}
_FINDER = "LmevalExtFinder"  # name of the class in the .pth line, and of the one below


class LmevalExtFinder:
    """The same finder as in the .pth line."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        return find_spec(name, path, target) if name in _ACTIONS else None


def install() -> None:
    """Puts the finder on `sys.meta_path`, unless the .pth line has done so."""
    if not any(getattr(finder, "__name__", "") == _FINDER for finder in sys.meta_path):
        sys.meta_path.insert(0, LmevalExtFinder)


def find_spec(name: str, path: Any, target: Any) -> Any:
    """Returns the other finders' spec for one of the modules in `_ACTIONS`, with our step added to its loader."""
    if os.environ.get("LMEVAL_EXT_DISABLE", "0") not in ("", "0"):
        return None
    for finder in sys.meta_path:
        if getattr(finder, "__name__", "") == _FINDER or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(name, path, target)
        if spec is not None:
            if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                _act_after(spec.loader, _ACTIONS[name])
            return spec
    return None


def _act_after(loader: Any, action: str) -> None:
    load = loader.exec_module

    def exec_module(module: Any) -> None:
        load(module)
        from lmeval_ext import _register

        getattr(_register, action)(module)

    loader.exec_module = exec_module
