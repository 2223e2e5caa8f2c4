"""Tells the test the server's pid."""

import os

from tests.compare.run.stub_harness import write_event

write_event({"server": os.getpid()})
