"""What the broker tells of the ends of tasks, and whether anything is left."""

from __future__ import annotations

import json
import time
from collections import Counter

import redis

from tests.support.names import KEYS

TERMINAL = {"SUCCESS", "FAILURE", "REVOKED"}


class Ends:
    """Every end that is published, by task."""

    def __init__(self, url: str) -> None:
        self.name = f"ends-{time.monotonic_ns()}"
        self._client = redis.Redis.from_url(url, socket_timeout=10, client_name=self.name)
        self._pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.psubscribe(f"{KEYS.meta_prefix}*")
        self.counted: Counter[str] = Counter()

    def read(self) -> Counter[str]:
        """All ends so far; what is published now is among them."""
        marker = f"#{time.monotonic_ns()}"
        self._client.publish(KEYS.meta_prefix + marker, "")
        while True:
            message = self._pubsub.get_message(timeout=5)
            if message is None:  # a confirmation, which is not told
                continue
            task_id = message["channel"].decode().removeprefix(KEYS.meta_prefix)
            if task_id == marker:
                return self.counted
            self.counted[task_id] += json.loads(message["data"])["status"] in TERMINAL

    def client_ids(self) -> tuple[int, int]:
        """Its connections, for a fault that is to spare them."""
        listed = self._client.client_list()
        own = [int(other["id"]) for other in listed if int(other.get("psub", 0)) and other["name"] == self.name]
        return own[0], int(self._client.client_id())

    def close(self) -> None:
        """Close both connections."""
        self._pubsub.close()
        self._client.close()


def nothing_is_left(client: redis.Redis) -> bool:
    """Whether nothing is queued, scheduled, in flight or to be done for clients."""
    if any(client.llen(key) for key in client.scan_iter("inference*", _type="list")):
        return False
    if any(client.hlen(key) for key in client.scan_iter("samphire:worker:*:inflight")):
        return False
    return not client.exists(KEYS.scheduled, KEYS.cancels, KEYS.deletes, KEYS.letters)
