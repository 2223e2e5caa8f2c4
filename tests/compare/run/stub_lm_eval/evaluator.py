"""Stands for heavy imports: each one is an event in $STUB_CALLS."""

import os

from tests.compare.run.stub_harness import write_event

print("imports of the stub")
write_event({"imported": os.getpid()})
