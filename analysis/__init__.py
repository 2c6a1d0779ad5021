"""What the runs show: curves over alpha, attention, probes, cases, training logs, and costs."""
