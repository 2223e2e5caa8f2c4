"""``python -m tests.compare.run.forked_compare``: `compare` whose default harness is the stub, forked from a server."""

import sys

from compare.cli import main
from compare.run.processes import local_pool

HARNESS = (sys.executable, "-m", "tests.compare.run.stub_lm_eval")

if __name__ == "__main__":
    local_pool.HARNESS = HARNESS
    sys.exit(main())
