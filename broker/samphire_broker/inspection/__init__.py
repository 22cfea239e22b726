"""Looking at a deployment: what lies where, and what could be wrong."""
