"""Tensors on the wire: the datatypes of the Open Inference Protocol, their bytes and their JSON values.

Bytes are row-major little-endian, as in the protocol's binary tensor data extension; an element of BYTES
is a 4-byte little-endian length and then its bytes. JSON values ("data") are the protocol's flattened or
nested lists. JSON has no NaN or infinity, and 16-bit floats lose nothing only as bytes, so such tensors
always travel as bytes.

Source: Open Inference Protocol v2, "Tensor Data Types"; Triton's extension_binary_data.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from samphire.errors import InvalidInputError

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Datatype name to numpy dtype, for all but BYTES, whose elements have no fixed size."""

ITEM_SIZES: dict[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
DATATYPES = frozenset([*DTYPES, "BYTES"])
FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
JSON_DATATYPES = DATATYPES - {"FP16", "BF16"}
"""Datatypes whose values may travel as JSON numbers, booleans or strings."""

MAX_DIMENSIONS = 32  # numpy's limit
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<I")


def element_count(shape: Sequence[int]) -> int:
    """Number of elements of a tensor of `shape`."""
    return math.prod(shape)


def check_shape(name: str, datatype: str, shape: Sequence[int]) -> None:
    """Check a datatype's name and a concrete shape.

    Raises:
        InvalidInputError: unknown datatype, negative dimension, or too many dimensions.
    """
    if datatype not in DATATYPES:
        raise InvalidInputError(
            f"tensor {name!r}: expected one of the datatypes {', '.join(sorted(DATATYPES))}, given {datatype!r}"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidInputError(f"tensor {name!r}: expected at most {MAX_DIMENSIONS} dimensions, given {len(shape)}")
    for dimension in shape:
        if not 0 <= dimension < 2**31:
            raise InvalidInputError(
                f"tensor {name!r}: expected dimensions from 0 to 2**31 - 1, given shape {list(shape)}"
            )


def check_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes) -> None:
    """Check that `data` is exactly one tensor of `datatype` and `shape`.

    Raises:
        InvalidInputError: the shape lies about the bytes; the message has both sizes.
    """
    count = element_count(shape)
    if datatype == "BYTES":
        given = sum(1 for _ in split_elements(name, data))
        if given != count:
            raise InvalidInputError(
                f"tensor {name!r}: shape {list(shape)} has {count} elements, given {given} in the bytes"
            )
        return
    expected = count * ITEM_SIZES[datatype]
    if len(data) != expected:
        raise InvalidInputError(
            f"tensor {name!r}: shape {list(shape)} of {datatype} takes {expected} bytes, given {len(data)}"
        )


def join_elements(elements: Iterable[bytes]) -> bytes:
    """Serialize the elements of a BYTES tensor, in row-major order."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def split_elements(name: str, data: bytes) -> Iterator[bytes]:
    """Yield the elements of a serialized BYTES tensor.

    Raises:
        InvalidInputError: a length runs past the end.
    """
    position, end = 0, len(data)
    while position < end:
        if position + 4 > end:
            raise InvalidInputError(f"tensor {name!r}: BYTES data ends inside an element's length")
        (length,) = _LENGTH.unpack_from(data, position)
        position += 4
        if position + length > end:
            raise InvalidInputError(f"tensor {name!r}: a BYTES element of {length} bytes runs past the end of the data")
        yield data[position : position + length]
        position += length


def array_to_bytes(name: str, value: Any, datatype: str | None = None) -> tuple[str, list[int], bytes]:
    """Encode an array, or anything that numpy makes one of, as (datatype, shape, bytes).

    Strings (dtype `U`, `S` or `object` of str or bytes) become BYTES, str as UTF-8. Elements of lists stay what they
    are: where numpy would change one to make them one dtype, the list is refused. Python's numbers have no datatype
    of their own: they take `datatype`, where that is known. Arrays keep theirs.

    Raises:
        InvalidInputError: no array, elements of several kinds, a number that `datatype` cannot hold, or a dtype
            without a counterpart in the protocol.
    """
    try:
        array = value if isinstance(value, np.ndarray) else _listed(name, value, datatype)
    # Lists of unequal lengths, an int of any size; a tensor of torch that has a gradient, or a dtype numpy lacks.
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InvalidInputError(
            f"tensor {name!r}: expected an array or lists of equal lengths, given what numpy makes none of: {error}"
        ) from error
    shape = list(array.shape)
    dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    given = _NAMES.get(dtype)
    if given is not None:
        return given, shape, np.ascontiguousarray(array, dtype=dtype).tobytes()
    if array.dtype.kind in "OUS":
        return "BYTES", shape, join_elements(_as_element(name, item) for item in array.ravel().tolist())
    raise InvalidInputError(
        f"tensor {name!r}: expected a dtype with a counterpart in {', '.join(sorted(DATATYPES))}, given {array.dtype}"
    )


def _listed(name: str, value: Any, datatype: str | None) -> NDArray[Any]:
    """An array of a list, or of anything that numpy makes one of, in which no element was changed."""
    array = np.asarray(value)
    if datatype in DTYPES:
        leaves = _leaves(value)
        if {type(leaf) for leaf in leaves} <= {bool, int, float}:
            return _numbers(name, datatype, leaves).reshape(array.shape)
    kind = array.dtype.kind
    if not isinstance(value, list | tuple) or kind not in "OUSbiuf":
        return array
    listed = np.asarray(value, dtype=np.object_)
    items = listed.ravel().tolist()
    if kind in "OUS":  # numpy makes 1 a string, and takes zeros from the end of bytes
        for item in items:
            _as_element(name, item)
        return listed
    types = set(map(type, items))
    if types == {int} and kind == "f":  # some are over 64 bits
        raise InvalidInputError(
            f"tensor {name!r}: expected integers of one datatype of at most 64 bits, given {str(value)[:200]}"
        )
    if len(types) > 1:
        for given, made in zip(items, array.ravel().tolist(), strict=True):
            _check_unchanged(name, given, made)
    return array


def _check_unchanged(name: str, given: Any, made: Any) -> None:
    item = given.item() if isinstance(given, np.generic) else given
    if isinstance(item, bool) is not isinstance(made, bool) or (item != made and item == item):
        raise InvalidInputError(
            f"tensor {name!r}: expected elements of one kind, given a list with {given!r}, which numpy would make "
            f"{made!r}: pass an array of the dtype that is meant"
        )


def _as_element(name: str, item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"tensor {name!a}: expected text that UTF-8 can hold, given {item!a}") from error
    raise InvalidInputError(f"tensor {name!r}: expected str or bytes elements, given {type(item).__name__}")


def bytes_to_array(name: str, datatype: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    """Decode bytes into an array of `shape`; BYTES become an object array of `bytes`.

    Numeric arrays are read-only views of `data`: copy them to write.

    Raises:
        InvalidInputError: the bytes do not fit the shape.
    """
    if datatype == "BYTES":
        check_bytes(name, datatype, shape, data)
        array = np.empty(element_count(shape), dtype=np.object_)
        array[:] = list(split_elements(name, data))
        return array.reshape(shape)
    if len(data) != element_count(shape) * ITEM_SIZES[datatype]:
        check_bytes(name, datatype, shape, data)
    return np.frombuffer(data, dtype=DTYPES[datatype]).reshape(shape)


NESTED_MAX = 32
"""Deepest nesting of a tensor's JSON values; no shape has so many dimensions."""


def _leaves(value: Any) -> list[Any]:
    """The elements of lists in lists, in row-major order; lists nested deeper than `NESTED_MAX` stay lists."""
    flat: list[Any] = [value]
    for _ in range(NESTED_MAX):  # not by recursion: the depth is the producer's choice
        if not any(isinstance(item, list | tuple) for item in flat):
            return flat
        flat = list(chain.from_iterable(item if isinstance(item, list | tuple) else (item,) for item in flat))
    return flat


def _numbers(name: str, datatype: str, flat: list[Any]) -> NDArray[Any]:
    """Python's numbers as an array [len(flat)] of a datatype, which is not BYTES.

    Raises:
        InvalidInputError: one is of the wrong type, or out of range.
    """
    dtype = DTYPES[datatype]
    is_float = datatype in FLOATS
    kinds = (int, float) if is_float else (bool,) if datatype == "BOOL" else (int,)
    for item in flat:
        if type(item) not in kinds:
            raise InvalidInputError(
                f"tensor {name!r}: expected {datatype} values, given {item!r} of type {type(item).__name__}"
            )
    fits = True
    if is_float:
        try:
            exact = np.array(flat, dtype=np.float64)
        except OverflowError as error:
            raise InvalidInputError(f"tensor {name!r}: a value is out of range for {datatype}") from error
        with np.errstate(over="ignore"):
            array = exact.astype(dtype)
        fits = bool((np.isinf(array) == np.isinf(exact)).all())
    elif datatype != "BOOL" and flat:
        limits = np.iinfo(dtype)
        fits = limits.min <= min(flat) and max(flat) <= limits.max
    if not fits:
        raise InvalidInputError(f"tensor {name!r}: a value is out of range for {datatype}")
    return array if is_float else np.array(flat, dtype=dtype)


def values_to_bytes(name: str, datatype: str, shape: Sequence[int], values: Any) -> bytes:
    """Encode JSON values, flat or nested in row-major order, as a tensor's bytes.

    Raises:
        InvalidInputError: wrong number of values, wrong type of a value, or one out of range.
    """
    if datatype not in JSON_DATATYPES:
        raise InvalidInputError(f"tensor {name!r}: {datatype} travels as raw bytes, not as JSON values")
    flat = _leaves(values)
    if any(isinstance(item, list) for item in flat):
        raise InvalidInputError(f"tensor {name!r}: expected values nested in at most {NESTED_MAX} lists, given more")
    if len(flat) != element_count(shape):
        raise InvalidInputError(
            f"tensor {name!r}: shape {list(shape)} has {element_count(shape)} elements, given {len(flat)} values"
        )
    if datatype == "BYTES":
        return join_elements(_as_element(name, item) for item in flat)
    return _numbers(name, datatype, flat).tobytes()


def bytes_to_values(name: str, datatype: str, shape: Sequence[int], data: bytes) -> list[Any] | None:
    """Decode bytes into a flat list of JSON values; None where JSON cannot hold them exactly.

    That is so for 16-bit floats, NaN and infinities, and BYTES that are not UTF-8.
    """
    if datatype not in JSON_DATATYPES:
        return None
    if datatype == "BYTES":
        try:
            return [element.decode() for element in split_elements(name, data)]
        except UnicodeDecodeError:
            return None
    array = bytes_to_array(name, datatype, shape, data)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return None
    values: list[Any] = array.ravel().tolist()
    return values
