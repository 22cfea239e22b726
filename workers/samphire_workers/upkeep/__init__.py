"""What a worker does beside its tasks: lease, lost workers, schedule, rights."""
