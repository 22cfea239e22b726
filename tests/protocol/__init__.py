"""A model of the task protocol, explored state by state, with the real scripts."""
