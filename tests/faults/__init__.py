"""Faults on real servers: every trial proves that its fault happened, then accounts for every task."""
