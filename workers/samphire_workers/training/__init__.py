"""Training: recipes that make model versions."""
