"""Course work: a tree to hand out, and points for what comes back."""
