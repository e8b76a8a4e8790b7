"""Foreign files end in one sentence; names can be printed."""

from __future__ import annotations

import json
import os
import pickle
import tokenize
import zipfile
from pathlib import Path

import pytest
from mutations import json_texts, mutations, outcome

from dml_fast.errors import TrainingError, UserError
from dml_fast.foreign import json_value, reading, shown


@pytest.mark.parametrize(
    "error",
    [
        ValueError("odd"), KeyError("key"), TypeError(), RecursionError("deep"), MemoryError(),
        EOFError(), NotImplementedError("dtype"), tokenize.TokenError("EOF"),
        zipfile.BadZipFile("bad\nzip"), pickle.UnpicklingError("\x1b[31m"),
        PermissionError(13, "no"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_parser_raises_is_one_sentence(error: Exception) -> None:
    sentence = r"^a\.npz (is damaged|cannot be read) \([ -~]+\): ask$"
    with pytest.raises(UserError, match=sentence), reading("a.npz", "ask"):
        raise error


@pytest.mark.parametrize("kind", [UserError, TrainingError])
def test_an_error_is_one_printable_line_whatever_it_quotes(kind: type[Exception]) -> None:
    error = kind(f"{os.fsdecode(b'caf' + bytes([0xE9]))}\n[red]\x1b[31m\t is gone")
    assert str(error) == r"caf\xe9\n[red]\x1b[31m\t is gone"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_for_the_user_passes_and_an_interrupt_too() -> None:
    with pytest.raises(UserError, match=r"^as it is$"), reading("a"):
        raise UserError("as it is")
    with pytest.raises(KeyboardInterrupt), reading("a"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5_000, b'{"a": 1, "a": 2}',
        "\ufeff{}".encode(), b'{"a": 1}{',
    ],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_bad_json_is_one_sentence(text: bytes) -> None:
    with pytest.raises(UserError, match=r"^run\.json is damaged \(.+\): restore it$"):
        json_value(text, "run.json")


def test_damaged_json_is_a_value_or_one_sentence() -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "d", "e": [True]}}
    read = [outcome(lambda text=text: json_value(text, "x")) for text in json_texts(value, 400)]
    assert None in read and any(r is not None for r in read)
    assert json_value(json.dumps(value), "x") == value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ünïcode 中", "Ünïcode 中"),
        (b"caf\xe9", r"caf\xe9"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        (Path("a\tb\nc\x1b[1m"), r"a\tb\nc\x1b[1m"),
        ("a\u202eb\u2028", r"a\u202eb\u2028"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_names_can_be_printed_in_one_line(name: object, expected: str) -> None:
    assert shown(name) == expected
    shown(name).encode("utf-8")


def test_mutations_differ_and_follow_their_seed() -> None:
    data = bytes(range(256)) * 4
    first = list(mutations(data, 70))
    assert first == list(mutations(data, 70)) != list(mutations(data, 70, seed=1))
    assert sum(m != data for m in first) >= 60
    assert list(mutations(b"", 10))
