"""From the queues to this worker: whose turn it is, how much, and what each message is."""
