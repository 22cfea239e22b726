"""What a lane does with its parts: the claim loop, sorting, and the table of kinds of task."""
