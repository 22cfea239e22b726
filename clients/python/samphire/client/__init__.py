"""The clients, and what they hand out: tasks, results, dead letters."""
