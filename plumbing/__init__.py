"""Infrastructure, not the method: files, processes, checkpoints, runs, media and tables."""

import os

# OpenMP threads busy-wait. On a shared machine that made a step three times slower; a small spin
# count lets them sleep instead. It must be set before torch starts its threads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
