"""Stands for an engine that opens the GPU's driver, the file $STUB_DRIVER."""

import os

from tests.compare.run.stub_lm_eval.late import counted

DRIVER = (os.open(os.environ["STUB_DRIVER"], os.O_RDONLY), counted)
