"""Settings that every test shares."""

from __future__ import annotations

import os

# Workers share the processors: with as many threads each as there are processors, they would wait for one another.
# Before torch is imported, which reads it once; the processes that tests start inherit it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from hypothesis import settings

# The same examples in every run: a failure can be repeated, and is never the machine's speed.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")
