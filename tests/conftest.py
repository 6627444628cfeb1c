"""Before anything imports torch: tiny models are several times slower on many threads, which wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("photoblip", deadline=None)  # tests run beside each other: a slow example says nothing
settings.load_profile("photoblip")
