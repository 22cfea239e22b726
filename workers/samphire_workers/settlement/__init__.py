"""How tasks end: results, next steps, retries, dead letters."""
