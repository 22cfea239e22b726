"""Streamed outputs as they lie in a task's log: MessagePack, tensors with their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from samphire.errors import ProtocolError
from samphire.wire.contract import Ref


class StreamedTensor(msgspec.Struct, array_like=True, frozen=True):
    """A tensor of one output: row-major little-endian, BYTES with length prefixes."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes | Ref
    """Its bytes, or the claim check of a large one."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[list[StreamedTensor]]).decode


def encode_outputs(outputs: Sequence[Sequence[StreamedTensor]]) -> bytes:
    """Several outputs, in their order; each is a list of tensors."""
    return _encode(outputs)


def decode_outputs(data: bytes) -> list[list[StreamedTensor]]:
    """The outputs of an entry.

    Raises:
        ProtocolError: it is not what a worker writes.
    """
    try:
        return _decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"an entry of a task's log is not understood: {error}") from error
