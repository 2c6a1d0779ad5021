"""Nothing of the method is here: files, processes, checkpoints, runs on disk, media and tables."""

import os

# torch's threads wait for each other in a busy loop. If another program wants the cores, too, they
# take them from each other: a step then took three times as long. So they soon go to sleep. This
# must stand before torch starts its threads; where nothing else runs, it changes nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
