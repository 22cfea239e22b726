"""The queues that a lane looks into: found, watched, and each in its turn."""
