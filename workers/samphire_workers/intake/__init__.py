"""From message to request: read, checked against its model, loaded."""
