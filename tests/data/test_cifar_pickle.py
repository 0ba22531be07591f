"""Pickles: as Python 2 and 3 write them, malformed, malicious, and damaged at random."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cifar_files_made import (
    LABELS,
    PIXELS,
    QUIET,
    RECORDS,
    array,
    check,
    contents,
    fails,
    parse,
    put_folder,
    python2,
    shrink,
    survives,
    text,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from infobatch_fast.data.cifar import load_cifar
from infobatch_fast.data.cifar_files import KINDS


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("key", ["labels", b"labels"])
def test_python3_pickles(tmp_path: Path, protocol: int, key: str | bytes) -> None:
    folder = put_folder(tmp_path, "cifar10", 1)
    pixels = "data" if isinstance(key, str) else b"data"
    for file, (planes, labels) in zip(
        KINDS["cifar10"].forms[1].files, contents("cifar10"), strict=True
    ):
        content = {key: labels, pixels: planes.reshape(RECORDS, 3072), "filenames": ["a.png"] * 3}
        (folder / file).write_bytes(pickle.dumps(content, protocol))
    check(load_cifar("cifar10", tmp_path), "cifar10")


def test_fortran_order_pickle() -> None:
    planes, labels = contents("cifar10")[0]
    pixels = np.asfortranarray(planes.reshape(RECORDS, 3072)).tobytes(order="F")
    raw = python2(array(pixels, module=b"numpy._core.multiarray", fortran=b"\x88"), labels)
    images, _ = parse(raw)
    assert np.array_equal(images, np.moveaxis(planes, 1, 3))


BAD_PICKLES = {
    "empty": (b"", "must be a CIFAR pickle"),
    "text": (b"hello", "must be a CIFAR pickle"),
    "no stop": (b"\x80\x02}", "exhausted before seeing STOP"),
    "stack": (b"\x80\x02R.", "must be a CIFAR pickle"),
    "not a dict": (b"\x80\x02].", "it must be a dict, got a list"),
    "no data": (b"\x80\x02}.", "the key data is missing"),
    "no labels": (python2(array(PIXELS), LABELS, b"fine_labels"), "the key labels is missing"),
    "few labels": (python2(array(PIXELS), [0, 1]), "labels must be a list of 3, got a list of 2"),
    "a tuple": (python2(array(PIXELS), b"K\x00K\x01K\x02\x87"), r"list of 3, got \(0, 1, 2\)"),
    "a label": (python2(array(PIXELS), b"](K\x00U\x01aK\x01e"), r"labels\[1\] must .* got 'a'"),
    "True": (python2(array(PIXELS), b"](K\x00\x88K\x01e"), r"labels\[1\] must .* got a bool"),
    "negative": (
        python2(array(PIXELS), b"](K\x00K\x01J\xff\xff\xff\xffe"),
        r"label of record 2 must be in \[0, 10\), got -1",
    ),
    "huge label": (
        python2(array(PIXELS), b"](K\x00K\x01\x8a\xff" + b"\x7f" * 255 + b"e"),
        r"record 2 must be in \[0, 10\), got 6287\d{56}$",
    ),
    "a string": (python2(text(PIXELS), LABELS), "data must be a numpy array, got '"),
    "a list": (python2(b"]", LABELS), "data must be a numpy array, got a list"),
    "no state": (python2(array(PIXELS)[:60], LABELS), "must be a CIFAR pickle"),
    "float": (python2(array(PIXELS, code=b"f4"), LABELS), "data must be uint8, got 'f4'"),
    "int8": (python2(array(PIXELS, code=b"i1"), LABELS), "data must be uint8, got 'i1'"),
    "object": (python2(array(PIXELS, code=b"O8"), LABELS), "data must be uint8, got 'O8'"),
    "fields": (
        python2(array(PIXELS, fields=b"NK\x01N"), LABELS),
        "data must be uint8, got a dtype with fields",
    ),
    "shape": (
        python2(array(PIXELS, (3072, RECORDS)), LABELS),
        r"data must have the shape \(3, 3072\), got \(3072, 3\)",
    ),
    "huge shape": (
        python2(array(PIXELS, (2**31 - 1, 2**31 - 1)), LABELS),
        r"data must have the shape \(3, 3072\), got \(2147483647, 2147483647\)",
    ),
    "huge at first": (
        python2(array(PIXELS, empty=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"), LABELS),
        "data must be rebuilt from an empty ndarray",
    ),
    "short": (python2(array(PIXELS[:-1]), LABELS), "data must hold 9216 bytes"),
    "memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "it numbers an object 2147483647"),
    "long bytes": (b"\x80\x02\x8e" + b"\xff" * 7 + b"\x7f.", "must be a CIFAR pickle"),
    "long array": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "must be a CIFAR pickle"),
    "tuples": (b"\x80\x02}K\x00" + b"2\x86" * 60 + b"K\x00s.", "it holds the opcode DUP"),
    "tuples in memo": (
        b"\x80\x02}K\x00" + b"q\x00h\x00\x86" * 60 + b"K\x00s.",
        "it holds more tuples than an array has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickle(case: str) -> None:
    raw, message = BAD_PICKLES[case]
    with fails(message) as caught:
        parse(raw)
    assert str(caught.value).startswith("FILE")
    assert "\n" not in str(caught.value)


def reduce(module: bytes, name: bytes, args: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n(" + args + b"tR"


MARK = "infobatch-was-here"
COMMAND = text(f"touch {MARK}".encode())
MALICIOUS = {
    "system": (reduce(b"os", b"system", COMMAND), "forbidden global os.system"),
    "posix": (reduce(b"posix", b"system", COMMAND), "forbidden global posix.system"),
    "eval": (
        reduce(b"builtins", b"eval", text(f"open({MARK!r}, 'w')".encode())),
        "forbidden global builtins.eval",
    ),
    "python 2": (reduce(b"__builtin__", b"eval", text(b"1")), "global __builtin__.eval"),
    "getattr": (reduce(b"builtins", b"getattr", text(b"os")), "global builtins.getattr"),
    "frompyfunc": (reduce(b"numpy", b"frompyfunc", b"K\x01K\x01"), "global numpy.frompyfunc"),
    "numpy load": (reduce(b"numpy", b"load", text(b"x")), "forbidden global numpy.load"),
    "dotted": (
        b"\x8c\x05numpy\x8c\x0bndarray.put\x93.",
        "forbidden global numpy.ndarray.put",
    ),
    "odd name": (b"\x8c\x03a\nb\x8c\x02\xc3\xa9\x93.", r"forbidden global a\\nb.\\xe9"),
    "nested": (
        b"cnumpy\ndtype\n(" + reduce(b"os", b"system", COMMAND) + b"tR",
        "forbidden global os.system",
    ),
    "codec": (
        reduce(b"_codecs", b"encode", text(b"x") + text(b"zlib")),
        "_codecs.encode for other than latin1",
    ),
    "inst": (b"(" + COMMAND + b"ios\nsystem\n", "opcode INST"),
    "obj": (b"(cnumpy\nndarray\n" + COMMAND + b"o", "opcode OBJ"),
    "newobj": (b"cnumpy\nndarray\n)\x81", "opcode NEWOBJ"),
    "extension": (b"\x82\x01", "opcode EXT1"),
    "persistent": (b"K\x01Q", "opcode BINPERSID"),
    "state of a global": (b"cnumpy\ndtype\n}" + text(b"a") + b"K\x00sb", "state of dtype"),
    "slots of a global": (b"cnumpy\ndtype\nN}" + text(b"a") + b"K\x00s\x86b", "of dtype"),
    "call of an array": (array(PIXELS) + b")R", "not callable"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = put_folder(tmp_path / "d", "cifar10", 1)
    code, message = MALICIOUS[case]
    # An otherwise sound file: what is hidden in a key that nobody reads counts as well.
    raw = python2(array(PIXELS), LABELS)[:-2] + text(b"more") + code + b"u."
    (folder / "data_batch_4").write_bytes(raw)
    with fails(f"{re.escape(str(folder))}/data_batch_4 must be a CIFAR pickle: .*{message}"):
        load_cifar("cifar10", tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {MARK}",)


def test_object_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = np.empty((RECORDS, 3072), object)
    with fails("data must be uint8, got 'O8'"):
        parse(pickle.dumps({"data": plain[:, :1], "labels": LABELS}, 2))
    plain[1, 1] = Bomb()
    with fails("must be (at most|a CIFAR pickle: it names the forbidden global posix.system)"):
        parse(pickle.dumps({"data": plain, "labels": LABELS}, 2))
    assert not list(tmp_path.iterdir())


# Fuzz


SOUND = python2(array(PIXELS), LABELS)
SOUND3 = pickle.dumps({"data": np.zeros((RECORDS, 3072), np.uint8), "labels": LABELS}, 4)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Some bytes changed, mostly outside the long run of zeros that the pixels are; maybe cut."""
    start = sound.index(bytes(2000)) + 100
    ends = st.one_of(st.integers(0, start), st.integers(start + 8000, len(sound) - 1))
    raw = bytearray(sound)
    for _ in range(draw(st.integers(0, 4))):
        raw[min(draw(ends), len(sound) - 1)] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])


CODES = st.sampled_from([bytes([code]) for code in range(256)])
PIECES = st.one_of(
    CODES,
    st.binary(max_size=9),
    st.sampled_from(list(b"Rbtsuea})(]\x85\x86\x87")).map(lambda code: bytes([code])),
    st.sampled_from([b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"U\x02u1"]),
    st.sampled_from([b"cnumpy.core.multiarray\n_reconstruct\n", b"U\x04data", b"U\x06latin1"]),
    st.sampled_from([b"K\x00", b"K\x01", b"q\x00", b"h\x00", b"h\x01"]),
)


@QUIET
@given(st.binary(max_size=200))
def test_fuzz_random_pickle(raw: bytes) -> None:
    survives(raw)
    survives(b"\x80\x02" + raw + b".")


@QUIET
@given(st.lists(PIECES, max_size=40))
def test_fuzz_opcodes(pieces: list[bytes]) -> None:
    survives(b"\x80\x02" + b"".join(pieces) + b".")
    survives(SOUND[:-2] + b"".join(pieces) + b"u.")


@settings(QUIET, max_examples=400)
@given(st.one_of(damaged(SOUND), damaged(SOUND3)))
def test_fuzz_damaged_pickle(raw: bytes) -> None:
    survives(raw)
