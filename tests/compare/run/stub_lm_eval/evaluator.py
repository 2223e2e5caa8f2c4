"""Stands for heavy imports: each one is a line of $STUB_IMPORTS, the pid of the process.

$STUB_DRIVER: a file that the fork server is to take for a GPU's driver.
"""

import os
import sys
from pathlib import Path

print("imports of the stub")
with Path(os.environ["STUB_IMPORTS"]).open("a") as file:
    file.write(f"{os.getpid()}\n")
if "STUB_DRIVER" in os.environ:
    vars(sys.modules["__main__"]).update(_DRIVERS=(os.environ["STUB_DRIVER"],), _GPUS=(os.environ["STUB_DRIVER"],))
