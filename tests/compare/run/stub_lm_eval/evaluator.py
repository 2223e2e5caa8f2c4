"""Stands for heavy imports: each one is a line of $STUB_IMPORTS, the pid of the process."""

import os
from pathlib import Path

print("imports of the stub")
with Path(os.environ["STUB_IMPORTS"]).open("a") as file:
    file.write(f"{os.getpid()}\n")
