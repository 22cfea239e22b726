"""Samphire within the transactions of a backend's own database."""
