"""Make the outbox table."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations, models


class Migration(migrations.Migration):
    """The table as its first version has it."""

    initial = True
    dependencies: ClassVar[list[Any]] = []
    operations: ClassVar[list[Any]] = [
        migrations.CreateModel(
            name="OutboxTask",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("task_id", models.CharField(max_length=255, unique=True)),
                ("queue", models.CharField(max_length=255)),
                ("task", models.TextField()),
                ("added_at", models.DateTimeField(auto_now_add=True)),
                ("refused", models.TextField(blank=True, default="")),
            ],
        ),
    ]
