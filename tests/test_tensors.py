"""The tensor codec: every datatype, there and back."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from samphire.errors import InvalidInputError
from samphire.wire.tensors import (
    DATATYPES,
    DTYPES,
    NESTED_MAX,
    array_to_bytes,
    bytes_to_array,
    bytes_to_values,
    check_bytes,
    check_shape,
    join_elements,
    split_elements,
    values_to_bytes,
)

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
PLAIN_DATATYPES = sorted(DATATYPES - {"BYTES", "BF16"})


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """A datatype's name and an array of it, NaN, infinities and zero-size included."""
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        elements = draw(st.lists(st.binary(max_size=20), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(int(np.prod(shape)), dtype=np.object_)
        array[:] = elements
        return datatype, array.reshape(shape)
    if datatype == "BF16":
        return datatype, draw(hnp.arrays(np.float32, shape)).astype(ml_dtypes.bfloat16)
    return datatype, draw(hnp.arrays(DTYPES[datatype], shape))


@given(arrays())
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_bytes_round_trip(sample: tuple[str, np.ndarray]) -> None:
    """An array comes back with the same datatype, shape and bits."""
    expected, array = sample
    datatype, shape, data = array_to_bytes("x", array)
    assert (datatype, shape) == (expected, list(array.shape))
    check_bytes("x", datatype, shape, data)
    back = bytes_to_array("x", datatype, shape, data)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tolist() == array.tolist() if datatype == "BYTES" else back.tobytes() == array.tobytes()


@given(arrays())
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_values_round_trip_or_are_refused(sample: tuple[str, np.ndarray]) -> None:
    """What is given as JSON values is exact; what JSON cannot hold is not given as values."""
    datatype, array = sample
    _, shape, data = array_to_bytes("x", array)
    values = bytes_to_values("x", datatype, shape, data)
    if datatype in ("FP16", "BF16") or (datatype.startswith("FP") and not np.isfinite(array).all()):
        assert values is None
    elif values is not None:
        assert values_to_bytes("x", datatype, shape, values) == data
    else:
        assert datatype == "BYTES"


def test_nested_and_flat_values_are_the_same() -> None:
    """The protocol allows both."""
    flat = values_to_bytes("x", "INT32", [2, 2], [1, 2, 3, 4])
    assert values_to_bytes("x", "INT32", [2, 2], [[1, 2], [3, 4]]) == flat


def test_strings_become_bytes_and_keep_their_letters() -> None:
    """Unicode travels as UTF-8."""
    datatype, shape, data = array_to_bytes("x", np.array(["Grüße", "日本語", ""]))
    assert (datatype, shape) == ("BYTES", [3])
    assert [element.decode() for element in split_elements("x", data)] == ["Grüße", "日本語", ""]


def test_big_endian_arrays_are_turned() -> None:
    """The wire is little-endian whatever the array was."""
    _, _, data = array_to_bytes("x", np.array([1, 2], dtype=">i4"))
    assert data == np.array([1, 2], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "expected"),
    [
        ("UINT8", [1], [256], "out of range"),
        ("INT8", [1], [-129], "out of range"),
        ("INT64", [1], [2**63], "out of range"),
        ("FP32", [1], [1e300], "out of range"),
        ("FP32", [1], ["1"], "expected FP32 values"),
        ("FP32", [1], [True], "expected FP32 values"),
        ("INT32", [1], [1.5], "expected INT32 values"),
        ("BOOL", [1], [1], "expected BOOL values"),
        ("BYTES", [1], [1], "expected str or bytes"),
        ("FP16", [1], [1.0], "travels as raw"),
        ("FP32", [2, 2], [1.0, 2.0], "4 elements, given 2"),
    ],
)
def test_wrong_values_are_named(datatype: str, shape: list[int], values: list[object], expected: str) -> None:
    """Each error says what was expected and what was given."""
    with pytest.raises(InvalidInputError, match=expected):
        values_to_bytes("x", datatype, shape, values)


@pytest.mark.parametrize(("datatype", "shape"), [("FP33", [1]), ("FP32", [-1]), ("FP32", [2**40]), ("FP32", [1] * 33)])
def test_wrong_shapes_are_named(datatype: str, shape: list[int]) -> None:
    """A shape is checked before anything is allocated for it."""
    with pytest.raises(InvalidInputError, match="expected"):
        check_shape("x", datatype, shape)


def test_a_lying_shape_is_found() -> None:
    """The bytes decide."""
    with pytest.raises(InvalidInputError, match="takes 4000000 bytes, given 4"):
        check_bytes("x", "FP32", [1000, 1000], b"\0\0\0\0")
    with pytest.raises(InvalidInputError, match="has 3 elements, given 1"):
        check_bytes("x", "BYTES", [3], join_elements([b"a"]))


@pytest.mark.parametrize("data", [b"\1\0", b"\5\0\0\0abc", b"\xff\xff\xff\xff"])
def test_broken_bytes_elements_are_found(data: bytes) -> None:
    """A length may not run past the end."""
    with pytest.raises(InvalidInputError, match="BYTES"):
        check_bytes("x", "BYTES", [1], data)


def test_an_unknown_dtype_is_named() -> None:
    """Complex numbers have no counterpart in the protocol."""
    with pytest.raises(InvalidInputError, match="given complex128"):
        array_to_bytes("x", np.array([1j]))


@pytest.mark.parametrize(
    ("value", "elements"),
    [
        ([[b"ab\0\0"]], [b"ab\0\0"]),
        ([b"\0", "ä\0"], [b"\0", "ä\0".encode()]),
        ([["a", b"b"], ["c", ""]], [b"a", b"b", b"c", b""]),
        ((np.str_("a"), np.bytes_(b"b\0")), [b"a", b"b\0"]),
        ([np.array([b"a\0", "b"], np.object_)], [b"a\0", b"b"]),
    ],
)
def test_strings_in_lists_are_encoded_as_they_are(value: Any, elements: list[bytes]) -> None:
    """numpy would cut zeros off their ends."""
    datatype, shape, data = array_to_bytes("x", value)
    assert (datatype, list(split_elements("x", data))) == ("BYTES", elements)
    assert shape == list(np.asarray(value, np.object_).shape)


@pytest.mark.parametrize(
    "value",
    [
        ["a", 1],
        [1, "a"],
        [b"a", None],
        ["a", 1.5],
        [True, 2],
        [2.5, False],
        [2**53 + 1, 0.5],
        [-1, 2**63],
        [[1], ["a"]],
    ],
)
def test_lists_of_several_kinds_are_refused_by_name(value: Any) -> None:
    """numpy would change a value to make them one."""
    with pytest.raises(InvalidInputError, match=r"tensor 'x': expected .*(elements|integers)"):
        array_to_bytes("x", value)


@pytest.mark.parametrize(
    ("value", "datatype"),
    [
        ([1, 2], "INT64"),
        ([1, 2.5], "FP64"),
        ([float("nan"), 1], "FP64"),
        ([True, False], "BOOL"),
        ([2**63], "UINT64"),
        ([np.float32(0.1), np.float32(2)], "FP32"),
        ([np.ones(2, np.float32), np.zeros(2, np.float32)], "FP32"),
        ([[]], "FP64"),
        (3, "INT64"),
    ],
)
def test_lists_that_numpy_takes_as_they_are(value: Any, datatype: str) -> None:
    assert array_to_bytes("x", value)[0] == datatype


@pytest.mark.parametrize("levels", [NESTED_MAX + 1, 600, 5000])
def test_values_nested_too_deep_are_refused(levels: int) -> None:
    """By name, whatever Python's own limit is."""
    values: Any = [1.0]
    for _ in range(levels):
        values = [values]
    with pytest.raises(InvalidInputError, match=r"tensor 'x': .* at most 32 lists"):
        values_to_bytes("x", "FP32", [1], values)
    assert values_to_bytes("x", "FP32", [1], [[[[1.0]]]]) == b"\x00\x00\x80?"


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("FP32", [[0.1, 2]], np.array([[0.1, 2]], np.float32)),
        ("FP32", 5, np.array(5, np.float32)),
        ("FP16", (0.5, 1.5), np.array([0.5, 1.5], np.float16)),
        ("BF16", [1.5], np.array([1.5], ml_dtypes.bfloat16)),
        ("FP32", [math.inf, math.nan], np.array([math.inf, math.nan], np.float32)),
        ("FP64", [], np.array([], np.float64)),
        ("UINT8", [0, 255], np.array([0, 255], np.uint8)),
        ("UINT64", [2**64 - 1], np.array([2**64 - 1], np.uint64)),
        ("BOOL", [[True], [False]], np.array([[True], [False]])),
    ],
)
def test_numbers_of_python_become_what_the_model_takes(datatype: str, value: Any, expected: NDArray[Any]) -> None:
    """They have no datatype of their own."""
    assert array_to_bytes("x", value, datatype) == (datatype, list(expected.shape), expected.tobytes())


@pytest.mark.parametrize(
    ("datatype", "value", "text"),
    [
        ("FP32", [1e39], "out of range for FP32"),
        ("FP16", [70000.0], "out of range for FP16"),
        ("BF16", [1e39], "out of range for BF16"),
        ("FP64", [10**400], "out of range for FP64"),
        ("INT8", [128], "out of range for INT8"),
        ("UINT8", [-1], "out of range for UINT8"),
        ("INT64", [0.5], "expected INT64 values, given 0.5 of type float"),
        ("FP32", [True], "expected FP32 values, given True of type bool"),
        ("BOOL", [1], "expected BOOL values, given 1 of type int"),
        ("FP32", [[1.0], [1.0, 2.0]], "lists of equal lengths"),
    ],
)
def test_numbers_that_the_model_cannot_take(datatype: str, value: Any, text: str) -> None:
    """It is said which, and why."""
    with pytest.raises(InvalidInputError, match=text):
        array_to_bytes("x", value, datatype)


@pytest.mark.parametrize("value", [np.ones(2), [np.ones(2)], [np.float64(1), 2.0]])
def test_what_has_a_datatype_keeps_it(value: Any) -> None:
    """Nothing is made less exact unasked."""
    assert array_to_bytes("x", value, "FP32")[0] == "FP64"
