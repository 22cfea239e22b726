"""The outbox table."""

from __future__ import annotations

from django.db import models


class OutboxTask(models.Model):
    """A task that was written in a transaction, and that a relay submits and then deletes."""

    task_id = models.CharField(max_length=255, unique=True)
    queue = models.CharField(max_length=255)
    task = models.TextField()
    added_at = models.DateTimeField(auto_now_add=True)
    refused = models.TextField(default="", blank=True)
    """Why it can never be submitted; empty: it waits."""

    def __str__(self) -> str:
        return str(self.task_id)
