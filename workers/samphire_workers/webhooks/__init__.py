"""Deliveries of webhooks: to which endpoint now, how, and what follows from the answer."""
