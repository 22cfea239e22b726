"""The stack on one machine: a real Valkey, a real Triton and real Celery workers, all on loopback."""
