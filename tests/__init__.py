"""Tests; they mirror src/armorm.

One thread for each process, this one and those that tests start: matrices are small, and threads of the linear algebra
libraries that wait for each other on busy cores cost ten times the work itself. The variables are read when numpy and
torch are first imported, so they are set here, before any conftest.
"""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
