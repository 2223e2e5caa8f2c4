"""Makes the unmodified `lm_eval` know our models and tasks.

lm-eval 0.4.13 has no plug-in discovery, so `lmeval_ext_hook.pth` imports this module at every start
of Python. It only puts a finder on `sys.meta_path`; the finder acts when, and only when, one of two
harness modules is imported, by running `lmeval_ext._register` after the module's own code.
`LMEVAL_EXT_DISABLE=1` switches all of it off.

Keep this module tiny: nothing but `sys`, and `os` (which Python has imported by then), may be imported here.
"""

from __future__ import annotations

import os
import sys

# harness module -> function of lmeval_ext._register that is called with it, once it is imported
_ACTIONS = {"lm_eval.models": "register_models", "lm_eval.tasks.manager": "register_tasks"}


class _Finder:
    """A meta-path finder that finds nothing itself and adds one step to two modules' loading."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]  # typing costs start-up time
        action = _ACTIONS.get(name)
        if action is None:
            return None
        for finder in sys.meta_path:
            if finder is _Finder or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    _act_after(spec.loader, action)
                return spec
        return None


def _act_after(loader, action):  # type: ignore[no-untyped-def]
    load = loader.exec_module

    def exec_module(module):  # type: ignore[no-untyped-def]
        load(module)
        from lmeval_ext import _register

        getattr(_register, action)(module)

    loader.exec_module = exec_module


if os.environ.get("LMEVAL_EXT_DISABLE", "0") in ("", "0") and _Finder not in sys.meta_path:
    sys.meta_path.insert(0, _Finder)
