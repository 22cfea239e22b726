"""What monitors are told of tasks."""
