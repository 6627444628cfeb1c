"""Before anything imports torch: tiny models are several times slower on many threads, which wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
