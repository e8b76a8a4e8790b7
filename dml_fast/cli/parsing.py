"""From a command line to a dataclass."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

from dml_fast.cli.usage import in_one_sentence
from dml_fast.errors import UserError

T = TypeVar("T")


class Alone(NamedTuple):
    """The value of a flag that is given without one, as metadata of a field's type."""

    value: str


def check_ending(flag: str, path: str | Path | None, *endings: str) -> None:
    """Refuse a name of a file that ends in none of these, such as ``.npz``; None is no name.

    Raises:
        UserError: it names them.
    """
    if path is not None and Path(path).suffix not in endings:
        raise UserError(f"{flag} {path} does not end in {' or '.join(endings)}: give such a name")


def parse(cls: type[T], argv: Sequence[str] | None, prog: str, default: T | None = None) -> T:
    """Parse a command line into a dataclass.

    After ``--help`` this exits with code 0.
    Its own fields, and those of each dataclass that it inherits from, are groups in ``--help``,
    under the names of these classes.

    Args:
        cls: the dataclass, each field of which is a flag.
        argv: the arguments; by default those of this process.
        prog: the command, after ``python -m dml_fast.``.
        default: values of the flags that are not given; by default those of ``cls``.

    Raises:
        UserError: of a wrong flag or value.
    """
    import tyro

    name = f"python -m dml_fast.{prog}"
    argv = _completed(cls, sys.argv[1:] if argv is None else argv)
    groups = [c for c in cls.__mro__ if is_dataclass(c) and _own_names(c)]
    if len(groups) > 1:
        nested: Any = _nested(cls, [cls, *groups[:0:-1]], prog, default)
        found = in_one_sentence(lambda: tyro.cli(nested, args=argv, prog=name), name)
        return cls(
            **{key: value for group in vars(found).values() for key, value in vars(group).items()}
        )
    if default is None:
        return in_one_sentence(lambda: tyro.cli(cls, args=argv, prog=name), name)
    return in_one_sentence(lambda: tyro.cli(cls, args=argv, prog=name, default=default), name)


def _completed(cls: type[Any], argv: Sequence[str]) -> list[str]:
    """Return the arguments with the values of flags that may stand alone."""
    values = {
        "--" + name.replace("_", "-"): alone
        for name, hint in get_type_hints(cls, include_extras=True).items()
        if (alone := _alone(hint))
    }
    found = []
    for argument, after in zip(argv, [*argv, "--"][1:], strict=True):
        found.append(argument)
        if argument.replace("_", "-") in values and after.startswith("--"):
            found.append(values[argument.replace("_", "-")])
    return found


def _alone(hint: Any) -> str:
    return next((one.value for one in get_args(hint)[1:] if isinstance(one, Alone)), "")


def _nested(cls: type[Any], groups: Sequence[type[Any]], prog: str, default: object) -> type[Any]:
    """Return a dataclass whose fields are the groups, which tyro shows apart.

    Args:
        cls: of which these are parts.
        groups: ``cls`` itself, then what it inherits from; the first that has a field shows it.
        prog: title of the fields of ``cls`` itself.
        default: a ``cls`` with the default values, or None.
    """
    import tyro

    hints = get_type_hints(cls, include_extras=True)
    values = {
        f.name: f.default if default is None else getattr(default, f.name) for f in fields(cls)
    }
    parts = []
    for group in groups:
        texts = _texts(group)  # type: ignore[arg-type]  # mypy: a type is not hashable
        own = [
            (name, Annotated[hints.pop(name), tyro.conf.arg(help=texts[name])], values[name])
            for name in _own_names(group)
            if name in hints
        ]
        if own:
            title = prog if group is cls else group.__name__.lower()
            part: Any = make_dataclass(title, own, frozen=True)
            part.__doc__ = "" if group is cls else group.__doc__
            # else tyro looks for a help in the source of `types`, which costs as much as the rest
            about = tyro.conf.arg(help=part.__doc__)
            parts.append((title, Annotated[part, about, tyro.conf.OmitArgPrefixes], part()))
    nested = make_dataclass(cls.__name__, parts)
    nested.__doc__ = cls.__doc__
    return nested


def _own_names(cls: type[Any]) -> list[str]:
    return [*inspect.get_annotations(cls)]


@cache
def _texts(cls: type[Any]) -> dict[str, str]:
    """Return the text below each of a class's own fields."""
    (source,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(source, ast.ClassDef)
    found = {}
    for line, below in zip(source.body, source.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(line.target, ast.Name) and isinstance(below.value, ast.Constant)
            found[line.target.id] = inspect.cleandoc(str(below.value.value))
    return found
