"""What a task is and where it goes: queues, the task store, the embedded stack and the `samphire` command."""
