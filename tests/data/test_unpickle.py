"""Hostile and damaged pickles."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dml_fast.data.readers.unpickle import read_batch
from dml_fast.errors import UserError


class Attack:
    """An object whose pickle is a call of ``function(*arguments)``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def canary_attacks(canary: Path) -> dict[str, bytes]:
    """Pickles that create ``canary`` in pickle.load, or name a function that can; by that name."""
    touch = f"open({str(canary)!r}, 'w').close()"
    array = np.arange(3, dtype=np.uint8)
    write_array = (np.ndarray.tofile, array, str(canary))
    return {
        "posix.system": pickle.dumps(Attack(os.system, f"touch {canary}")),
        "os.system": f"cos\nsystem\n(S'touch {canary}'\ntR.".encode(),
        "builtins.eval": pickle.dumps(Attack(eval, touch)),
        "builtins.exec": pickle.dumps(Attack(exec, touch)),
        "__builtin__.eval": pickle.dumps(Attack(eval, touch), protocol=2),
        "builtins.getattr": pickle.dumps(Attack(*write_array), protocol=4),
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "numpy.load": b"\x80\x02cnumpy\nload\n.",
        "numpy.__builtins__": b"\x80\x02cnumpy\n__builtins__\n.",
        "numpy.core.multiarray.fromfile": b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
        "numpy.dtype.__class__": b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
        "_codecs.decode": b"\x80\x02c_codecs\ndecode\n.",
        "_codecs.encode.__self__": b"\x80\x04\x8c\x07_codecs\x8c\x0fencode.__self__\x93.",
        "os.popen": f"(S'touch {canary}'\nios\npopen\n.".encode(),  # INST, of protocol 0
    }


@pytest.mark.parametrize("name", canary_attacks(Path("x")))
def test_attacks_are_refused_by_name_and_not_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    raw = canary_attacks(canary)[name]
    with pytest.raises(UserError, match=rf"data_batch_1 is damaged \(it asks for {name}\)"):
        read_batch(raw, "data_batch_1")
    assert not canary.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """The same bytes do harm in pickle.loads; otherwise the test above would prove nothing."""
    for name in ("posix.system", "os.system", "builtins.eval", "builtins.exec"):
        canary = tmp_path / name
        pickle.loads(canary_attacks(canary)[name])
        assert canary.exists()


STUB = b"c_codecs\nencode\n"


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"


DTYPE = b"cnumpy\ndtype\n"


@pytest.mark.parametrize(
    "body",
    [
        STUB + b"}U\x01aK\x01sb",  # BUILD with a dict: would set attributes of a function
        STUB + b"N}U\x0c__defaults__K\x01s\x86b",  # BUILD with slot state: setattr
        DTYPE + b"}b",
        ARRAY + b")\x81",  # NEWOBJ of a stub
        b"cnumpy\nndarray\n)R",  # calling ndarray
        DTYPE + b"U\x02O8\x85R",  # an array of objects
        DTYPE + b"U\x02f4\x85R",
        STUB + b"(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR",  # another codec
        STUB + b"(K\x01X\x06\x00\x00\x00latin1tR",
        ARRAY + b")R(K\x01K\x05\x85" + DTYPE + b"U\x02u1\x85R\x89U\x03abctb",  # 5 of 3 bytes
        ARRAY
        + b")R(K\x01J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86"
        + DTYPE
        + b"U\x02u1\x85R\x89U\x03abctb",
        ARRAY + b")R(K\x01K\x03\x85U\x02u1\x89U\x03abctb",  # a dtype that is no dtype
        ARRAY + b")R}U\x05valueK\x01sb",  # state of another form
        b"P1\n",  # a persistent id
        b"\x97",  # an out-of-band buffer
        b"\x82\x01",  # an extension code
    ],
)
def test_misuse_of_what_is_allowed_is_refused(body: bytes) -> None:
    with pytest.raises(UserError, match="the_file is damaged") as caught:
        read_batch(b"\x80\x02}U\x01a" + body + b"s.", "the_file")
    assert "\n" not in str(caught.value)
    honest = {"text": b"x", "pixels": np.arange(3, dtype=np.uint8)}  # the stubs are as before
    batch = read_batch(pickle.dumps(honest, 2), "x")
    assert batch["text"] == b"x" and batch["pixels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "body",
    [
        b"N" + b"\x85" * 500_000 + b"K\x01s",  # its hash would overflow the stack
        b"N" + b"2\x86" * 60 + b"K\x01s",  # 60 tuples, whose hash would take 2 ** 60 steps
        b"NK\x01s",
        b"(NK\x01u",
        b"(N" + b"2\x86" * 60 + b"K\x01d",
        b"\x8fN" + b"2\x86" * 60 + b"\x90",  # a set
        DTYPE + b"N" + b"2\x86" * 60 + b"\x85R",  # quoted in an error
        ARRAY + b")R(K\x01(" + b"\x8a\xff" * 9 + b"t" + DTYPE + b"U\x02u1\x85R\x89U\x03abctb",
        b"I" + b"1" * 5000 + b"\n",
    ],
    ids=range(9),
)
def test_what_would_crash_or_never_end_is_refused(body: bytes) -> None:
    with pytest.raises(UserError, match="the_file is damaged") as caught:
        read_batch(b"\x80\x02}" + body + b".", "the_file")
    assert len(str(caught.value)) < 400


def test_the_number_of_a_place_in_the_memo_takes_no_memory() -> None:
    """C's unpickler would take 64 GB here."""
    assert read_batch(b"\x80\x02}r\xff\xff\xff\xff.", "x") == {}


@pytest.mark.parametrize("raw", [b"", b"\x80\x02", pickle.dumps(1), pickle.dumps([1])])
def test_what_is_no_pickled_dict_is_refused(raw: bytes) -> None:
    with pytest.raises(UserError, match="the_file is damaged"):
        read_batch(raw, "the_file")


def test_arrays_keep_shape_and_order() -> None:
    source = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (source, np.asfortranarray(source), source[:0]):
        batch = read_batch(pickle.dumps({"a": array}, 4), "x")
        np.testing.assert_array_equal(batch["a"], array)
