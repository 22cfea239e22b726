"""A Celery application that knows nothing of Samphire."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from celery import Celery

from samphire_workers.settlement.next_steps import NESTED_MAX


@contextlib.contextmanager
def plain_celery(url: str) -> Iterator[Celery]:
    """An application whose connections are all closed at the end."""
    with Celery("plain", broker=url, backend=url, set_as_current=False) as app:
        app.conf.result_chord_join_timeout = 10
        app.conf.broker_pool_limit = 2 * NESTED_MAX  # the same for all of a process: see `celery_settings`
        app.conf.result_backend_thread_safe = True  # one backend for all threads: what each subscribes to ends here
        try:
            yield app
        finally:
            # A result that is collected later would unsubscribe, on a new connection that nobody closes.
            app.backend.result_consumer.subscribed_to.clear()
            app.backend.result_consumer.stop()
            app.backend.client.connection_pool.disconnect()
    gc.collect()  # what Celery leaves open is complained of here, where that is expected
