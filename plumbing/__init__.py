"""Nothing of the method is here: files, processes, checkpoints, runs on disk, media and tables."""
