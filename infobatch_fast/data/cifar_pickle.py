"""The pixels and labels of a CIFAR pickle, read without running what the pickle says.

Three walls: before anything is loaded, opcodes beyond those of plain values and calls are refused;
so is every global but the four that an array needs; and their calls, which are never made by the
pickle, are recorded, checked and carried out here. It never touches numpy.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from infobatch_fast.data.dataset import PIXELS

# What a pickle of dicts, lists, strings, integers and one array is made of. Left out are the
# opcodes that name objects by other ways than find_class, and those that reserve memory unread.
_OPCODES = """
PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINSTRING SHORT_BINSTRING
BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST EMPTY_TUPLE
EMPTY_DICT APPEND APPENDS SETITEM SETITEMS TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE
BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}


def parse_pickle(raw: bytes, records: int, label_key: str) -> tuple[np.ndarray, list[int]]:
    """Pixels (R, 3072) uint8 and a list of R integers, not looked at, out of a pickle.

    Args:
        raw: The whole file.
        records: R, how many it must hold.
        label_key: The key of the labels; the key of the pixels is `data`.

    Raises:
        Exception: of nearly any type: the pickle is malformed, or holds anything else.
    """
    _check_opcodes(raw)
    content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    if type(content) is not dict:
        raise ValueError(f"it must be a dict, got {_show(content)}")
    values = []
    for key in ("data", label_key):
        if key not in content and key.encode() not in content:
            raise ValueError(f"the key {key} is missing")
        values.append(content[key] if key in content else content[key.encode()])
    data, labels = values
    if type(labels) is not list or len(labels) != records:
        length = f" of {len(labels)}" if type(labels) is list else ""
        raise ValueError(f"{label_key} must be a list of {records}, got {_show(labels)}{length}")
    for record, label in enumerate(labels):
        if type(label) is not int:
            raise ValueError(f"{label_key}[{record}] must be an integer, got {_show(label)}")
    return _array(data, (records, PIXELS)), labels


def _check_opcodes(raw: bytes) -> None:
    """Raise `ValueError` for what could reach beyond plain values, or take memory or years."""
    allowed, tuples = set(_OPCODES.split()), 0
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name not in allowed:
            raise ValueError(f"it holds the opcode {opcode.name}")
        # The memo is a list as long as its largest number.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > 1_000_000:
            raise ValueError(f"it numbers an object {argument}")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > 16:  # a published file has 6 to 8; hashing nested ones takes 2^depth steps
            raise ValueError("it holds more tuples than an array has")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _GLOBALS:
            name = ascii(f"{module_name}.{global_name}")[1:-1][:100]
            raise pickle.UnpicklingError(f"it names the forbidden global {name}")
        return _Global(_GLOBALS[module_name, global_name])


class _Global:
    """Stands in for an importable name; a call of it is recorded."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> Any:
        if self.name != "encode":
            return _Call(self.name, args)
        text, codec = args  # how Python 3 writes bytes in protocol 2
        if type(text) is not str or type(codec) is not str or codec != "latin1":
            raise pickle.UnpicklingError("it calls _codecs.encode for other than latin1")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it sets the state of {self.name}")


class _Call:
    """A call that the pickle asked for: the callable's name, its arguments, the state set later."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _array(value: Any, shape: tuple[int, int]) -> np.ndarray:
    """The uint8 array of `shape` that a pickle described.

    Raises:
        ValueError: it described anything else.
    """
    state = value.state if isinstance(value, _Call) and value.name == "array" else None
    if type(state) is not tuple or len(state) != 5:
        raise ValueError(f"data must be a numpy array, got {_show(value)}")
    args = value.args
    if len(args) != 3 or getattr(args[0], "name", "") != "ndarray" or args[1] != (0,):
        raise ValueError("data must be rebuilt from an empty ndarray")
    _, got, dtype, fortran, buffer = state
    known = isinstance(dtype, _Call) and dtype.name == "dtype" and dtype.args
    code = dtype.args[0] if known else None
    if type(code) is bytes:
        code = code.decode("latin1")
    if code not in ("u1", "|u1", "uint8"):
        raise ValueError(f"data must be uint8, got {_show(code)}")
    fields = dtype.state[2:5] if type(dtype.state) is tuple else ()
    if any(field is not None for field in fields):
        raise ValueError("data must be uint8, got a dtype with fields")
    if type(got) is not tuple or got != shape:
        raise ValueError(f"data must have the shape {shape}, got {_show(got)}")
    if type(buffer) is str:
        buffer = buffer.encode("latin1")
    if type(buffer) is not bytes or len(buffer) != shape[0] * shape[1]:
        raise ValueError(f"data must hold {shape[0] * shape[1]} bytes")
    return np.frombuffer(buffer, np.uint8).reshape(shape, order="F" if fortran else "C")


def _show(value: object) -> str:
    """A bounded description of an untrusted value (a nested one can print as gigabytes)."""
    if type(value) is tuple and len(value) < 5 and all(type(v) is int for v in value):
        return str(value)[:60]
    return repr(value)[:60] if type(value) in (int, str) else f"a {type(value).__name__}"
