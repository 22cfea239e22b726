"""Tasks within a transaction of Django: submitted once it commits, or kept in an outbox that commits with it.

>>> task = submit_on_commit(client, "digits", {"image": image})    # lost if the process dies after the commit
>>> task_id = add_to_outbox(client, "digits", {"image": image})    # never lost: `manage.py samphire_relay` submits it

The outbox takes `"samphire.contrib.django"` in `INSTALLED_APPS`, and `manage.py migrate`.
"""

from __future__ import annotations

from typing import Unpack

from django.db import transaction

from samphire.client.encoder import Inputs
from samphire.client.prepared import SubmitOptions
from samphire.client.sync import Client
from samphire.client.sync_parts import Task
from samphire.contrib.outbox import prepare_once, to_row


def submit_on_commit(
    client: Client, model: str, inputs: Inputs, *, using: str | None = None, **options: Unpack[SubmitOptions]
) -> Task:
    """Submit an inference once the transaction under way has committed; return its handle now.

    The request is checked and encoded now. A transaction or savepoint that is rolled back submits nothing; without a
    transaction it is submitted at once. A process that dies between commit and submit loses the task, and a broker that
    is away then raises from the end of the outermost `atomic` block, after the data was committed: use `add_to_outbox`
    where nothing may be lost. Django runs no callback of that commit after one that raises: tasks that follow are lost
    too.

    Args:
        client: submits it.
        model, inputs, options: as in `Client.submit`, but for `idempotency_key`.
        using: the database whose transaction it is; by default the default one.

    Raises:
        InvalidInputError: as in `Client.submit`; nothing is submitted.
    """
    prepared = prepare_once(client, model, inputs, options)
    transaction.on_commit(lambda: client.submit_prepared(prepared), using=using)
    return client.task(prepared.id)


def add_to_outbox(
    client: Client, model: str, inputs: Inputs, *, using: str | None = None, **options: Unpack[SubmitOptions]
) -> str:
    """Write an inference into the outbox, within the transaction under way; return the task's id.

    Once that commits, `manage.py samphire_relay` submits it; `client.task(id)` is its handle then. Delays and deadlines
    count from now.

    Args:
        client: checks the request.
        model, inputs, options: as in `Client.submit`, but for `idempotency_key`.
        using: the database that has the outbox; by default the one that the router says.

    Raises:
        InvalidInputError: as in `Client.submit`; nothing is written.
    """
    from samphire.contrib.django.models import OutboxTask  # models can be imported once the applications are loaded

    prepared = prepare_once(client, model, inputs, options)
    OutboxTask.objects.using(using).create(task_id=prepared.id, queue=prepared.queue, task=to_row(prepared))
    return prepared.id
