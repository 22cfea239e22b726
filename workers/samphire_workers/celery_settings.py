"""Where Celery finds the broker: the one address of the deployment, as each part of Celery wants to be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samphire.errors import InvalidInputError
from samphire.transport.address import Broker
from samphire_workers.settlement.next_steps import NESTED_MAX

BROKER_SETTINGS = (
    *("broker_url", "result_backend", "broker_use_ssl", "redis_backend_use_ssl"),
    *("broker_transport_options", "result_backend_transport_options"),
)
"""What another application needs to find the same."""

_OTHER_ADDRESSES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")


def celery_settings(broker: Broker) -> dict[str, Any]:
    """Celery's settings for one broker, as broker and as result backend."""
    prefix = broker.keys.celery_prefix
    return {
        "broker_url": broker.address.celery_url,
        "result_backend": broker.address.celery_url,
        "broker_use_ssl": broker.address.celery_ssl,
        "redis_backend_use_ssl": broker.address.celery_ssl,
        "broker_transport_options": {
            "socket_timeout": 30.0,
            "socket_connect_timeout": 5.0,
            "socket_keepalive": True,
            "global_keyprefix": prefix,
            "samphire_namespace": broker.keys.namespace,
        },
        "result_backend_transport_options": {"global_keyprefix": prefix},
        # Each level of nesting takes one, and would wait for ever for one more. kombu has one limit for all the
        # applications of a process, and cannot lower it while connections are in use.
        "broker_pool_limit": 2 * NESTED_MAX,
    }


def refuse_other_addresses(environment: Mapping[str, str]) -> None:
    """Raise where Celery would take another address than ours for a part of the worker.

    Celery prefers these variables to what its application says, so results, revocations and events would go elsewhere.

    Raises:
        InvalidInputError: one is set.
    """
    for name in _OTHER_ADDRESSES:
        if environment.get(name):
            raise InvalidInputError(
                f"{name} is set, and Celery would take it for a part of this worker instead of SAMPHIRE_BROKER_URL: "
                "unset it for workers and Flower"
            )
