"""The lane: what moves a queue's tasks through a worker, from claim to settlement."""
