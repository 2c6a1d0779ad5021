"""What the runs show: curves over alpha, attention, probes, cases, training logs, and costs."""

import plumbing  # noqa: F401 (before torch: sets how its threads wait)
