"""What stands on the wire: names of keys, the contract, Celery's message, tensors."""
