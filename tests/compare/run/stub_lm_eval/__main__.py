"""``python -m tests.compare.run.stub_lm_eval``: the stub harness."""

import sys

from tests.compare.run import stub_harness

stub_harness.ARGUMENTS = sys.argv[1:]
if __name__ == "__main__":
    sys.exit(stub_harness.main())
