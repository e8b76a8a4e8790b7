"""Foreign files end in one sentence; names can be printed."""

from __future__ import annotations

import json
import os
import pickle
import tokenize
import zipfile
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from mutations import json_texts, mutations, outcome

from dml_fast.errors import TrainingError, UserError
from dml_fast.foreign import Unfit, content, json_value, reading, shown, typed


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
        "\ufeff{}".encode(), b'{"a": 1}{', b"NaN", b"[-Infinity]",
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


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert content(tmp_path / "link") == b"x"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, why in {
        "": "Is a directory", "pipe": "it is not a file", "dangling": "No such file",
        "n" * 300: "File name too long", "file/x": "Not a directory",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"{why}.*\): restore it$"):
            content(tmp_path / name)
    with pytest.raises(UserError, match="it is not a file"):
        content("/dev/zero")


class Optional(TypedDict, total=False):
    more: int


class Line(Optional):
    scores: list[float | None]
    kind: Literal["a", "b"]
    size: tuple[int, int]
    named: dict[str, bool]


LINE = {"scores": [1, None], "kind": "a", "size": [3, 4], "named": {"x": True}, "unknown": ["y"]}


def test_a_value_of_the_right_type_comes_back() -> None:
    found = typed(LINE, Line, "line")
    assert found == {**LINE, "size": (3, 4)} and type(found["scores"][0]) is float
    assert typed([1, 2, 3], tuple[float, ...], "x") == (1.0, 2.0, 3.0)
    assert typed(None, None, "x") is None and typed(b"", object, "x") == b""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scores": [True]}, r"line.scores\[0\] is True and not a number or null"),
        ({"scores": [float("nan")]}, r"line.scores\[0\] is nan"),
        ({"scores": [10**400]}, r"line.scores\[0\] is 1000"),
        ({"scores": {}}, "line.scores is a dict and not such a list"),
        ({"kind": "c"}, "line.kind is 'c' and not one of a, b"),
        ({"kind": ["a"]}, "line.kind is a list of length 1"),
        ({"size": [3]}, "line.size is a list of length 1"),
        ({"size": [3, 4.0]}, r"line.size\[1\] is 4.0 and not a whole number"),
        ({"size": [3, True]}, r"line.size\[1\] is True"),
        ({"size": [3, 2**63]}, r"line.size\[1\] is 9223372036854775808"),
        ({"size": [3, 1 << 20_000]}, r"line.size\[1\] is a number of thousands of digits"),
        ({"named": {"x": 1}}, "line.named.'x' is 1 and not true or false"),
        ({"named": {1: True}}, "a key of line.named is 1 and not a text"),
        ({"more": "x" * 99}, r"line.more is 'x{77}\.\.\.' and not a whole number"),
    ],
)
def test_a_value_of_another_type_is_named(change: dict[str, Any], why: str) -> None:
    with pytest.raises(Unfit, match=f"^{why}"):
        typed(LINE | change, Line, "line")
    with pytest.raises(Unfit, match=r"^line has no kind$"):
        typed({k: v for k, v in LINE.items() if k != "kind"}, Line, "line")
    for other in (None, [], "x"):
        with pytest.raises(Unfit, match=r"and not an object$"):
            typed(other, Line, "line")


def test_what_is_wrong_in_a_whole_file_is_named_by_its_key() -> None:
    with pytest.raises(Unfit, match=r"^kind is 'c' and not one of a, b$"):
        typed(LINE | {"kind": "c"}, Line, "it")
    with pytest.raises(Unfit, match=r"^it is a list of length 0 and not an object$"):
        typed([], Line, "it")
