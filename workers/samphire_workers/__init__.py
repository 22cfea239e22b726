"""The Celery application and what it runs: lanes, micro-batching, the Triton adapter."""
