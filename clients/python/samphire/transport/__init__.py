"""How the SDK reaches the broker: its address, connections, clock, and publication."""
