"""Endpoints of webhooks: what operators set, their secrets, and what becomes of deliveries."""
