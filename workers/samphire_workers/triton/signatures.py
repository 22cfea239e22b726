"""The signatures of a model on each endpoint, and what to do where they differ.

Requests are checked once and may go to any endpoint that serves the model, so all of them must take the same. Where
they do not, the first in the order of SAMPHIRE_TRITON_URLS that answers counts, and the others are not asked.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Sequence

from samphire.wire.signature import ModelSignature, TensorSpec

logger = logging.getLogger(__name__)


def form(signature: ModelSignature) -> object:
    """What endpoints must agree on: everything but the versions, which come and go, and how requests are joined."""
    return (
        dict(signature.inputs),
        dict(signature.outputs),
        signature.max_batch_size,
        signature.decoupled,
        signature.sequence_batching,
    )


class Signatures:
    """What each endpoint has said of each model, by the endpoint's URL."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._seen: defaultdict[str, dict[str, ModelSignature]] = defaultdict(dict)
        self._told: dict[tuple[str, str], object] = {}
        """What was told of a model on an endpoint that differs."""

    def note(self, url: str, signature: ModelSignature) -> None:
        """An endpoint has said what a model takes."""
        self._seen[signature.name][url] = signature

    def forget(self, url: str, model: str) -> None:
        """An endpoint does not have a model any more."""
        self._seen[model].pop(url, None)

    def of(self, url: str, model: str) -> ModelSignature | None:
        """What an endpoint has said of a model."""
        return self._seen[model].get(url)

    def differing(self, model: str, answering: Collection[str]) -> list[str]:
        """Of the endpoints that answer, those whose signature of a model is another than that of the first.

        What differs is said once.
        """
        urls = [url for url in self._urls if url in answering]
        seen = [(url, self._seen[model][url]) for url in urls if url in self._seen[model]]
        if not seen:
            return []
        first_url, first = seen[0]
        others = [(url, signature) for url, signature in seen[1:] if form(signature) != form(first)]
        for url, signature in others:
            if self._told.get((url, model)) != form(signature):
                self._told[url, model] = form(signature)
                logger.error(
                    "model %s differs between endpoints: %s takes %s; %s takes %s. Its requests go to %s only: make "
                    "the two alike",
                    *(model, first_url, shown(first), url, shown(signature), first_url),
                    extra={"action": "signatures_differ"},
                )
        for url, _ in seen:
            if url not in dict(others):
                self._told.pop((url, model), None)
        return [url for url, _ in others]


def shown(signature: ModelSignature) -> str:
    """A signature in a line."""
    inputs, outputs = (", ".join(map(_tensor, tensors.values())) for tensors in (signature.inputs, signature.outputs))
    return f"({inputs}) -> ({outputs}), max_batch_size {signature.max_batch_size}"


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.datatype}{list(spec.shape)}"
