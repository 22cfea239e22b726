"""A request's tensors brought into memory: from JSON values, base64, and claim checks."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
from collections.abc import Mapping

import msgspec
from msgspec import UNSET

from samphire.errors import InvalidInputError
from samphire.wire.contract import InputTensor, Ref
from samphire.wire.envelope import parse
from samphire.wire.tensors import check_bytes, values_to_bytes
from samphire_broker.store import Store
from samphire_workers.intake.parents import sources_of
from samphire_workers.intake.request import Request

HASH_IN_THREAD_BYTES = 256 * 2**10
"""Above this, hashing leaves the event loop: hashlib releases the interpreter's lock."""

LOAD_IN_THREAD_BYTES = 64 * 2**10
"""With more JSON values than that a request leaves the event loop while they are read."""

_decode_json = msgspec.json.Decoder().decode


def has_refs(request: Request) -> bool:
    """Whether a tensor has to be fetched from the broker."""
    return any(source.ref is not UNSET for tensor in request.request.inputs for source in sources_of(tensor))


async def fetch(request: Request, store: Store) -> dict[str, bytes]:
    """Bytes behind a request's claim checks, by key.

    Raises:
        InvalidInputError: one is gone, or its bytes were altered.
    """
    return {
        source.ref.key: await _redeem(tensor.name, source.ref, store)
        for tensor in request.request.inputs
        for source in sources_of(tensor)
        if isinstance(source.ref, Ref)
    }


def takes_long(request: Request) -> bool:
    """Whether to load it in a thread: many JSON values, each of which is looked at."""
    sources = (source for tensor in request.request.inputs for source in sources_of(tensor))
    return sum(memoryview(source.data).nbytes for source in sources if source.data is not UNSET) > LOAD_IN_THREAD_BYTES


def load(request: Request, fetched: Mapping[str, bytes]) -> None:
    """Bring a request's tensors into memory, as bytes in the order of its inputs.

    Raises:
        InvalidInputError: bytes that do not fit the shape.
    """
    request.tensors = [
        b"".join([_values(source, fetched) for source in sources_of(tensor)]) for tensor in request.request.inputs
    ]


def _values(tensor: InputTensor, fetched: Mapping[str, bytes]) -> bytes:
    if isinstance(tensor.raw, str):
        try:
            data = binascii.a2b_base64(tensor.raw, strict_mode=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInputError(f"input {tensor.name!r}: raw is not base64: {error}") from error
    elif isinstance(tensor.ref, Ref):
        data = fetched[tensor.ref.key]
    else:
        values = parse(_decode_json, tensor.data, f"input {tensor.name!r}: expected data in JSON")  # type: ignore[arg-type]
        data = values_to_bytes(tensor.name, tensor.datatype, tensor.shape, values)
    check_bytes(tensor.name, tensor.datatype, tensor.shape, data)
    return data


async def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`; of large data in a thread."""
    if len(data) < HASH_IN_THREAD_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())


async def _redeem(name: str, ref: Ref, store: Store) -> bytes:
    data = await store.read_blob(ref.key, ref.size)
    if data is None:
        raise InvalidInputError(f"input {name!r}: the claim check {ref.key!r} has expired or never was")
    if len(data) != ref.size:
        raise InvalidInputError(f"input {name!r}: expected {ref.size} bytes behind {ref.key!r}, found {len(data)}")
    digest = await sha256_hex(data)
    if digest != ref.sha256.lower():
        raise InvalidInputError(
            f"input {name!r}: the bytes behind {ref.key!r} have another sha256 than {ref.sha256[:64]!r}, which the "
            "request says"
        )
    return data
