"""Text as vectors: tf-idf and truncated SVD of several levels, fitted on the training rows.

What is stored is the vocabulary as JSON, and the weights, components and deviations as arrays. The
vectorizers are scikit-learn's, made anew from these, so that no pickle is needed. Latent semantic
analysis: Deerwester et al., JASIS 1990. Word pairs for discourse relations: Marcu and Echihabi,
ACL 2002; first and last words: Pitler et al., ACL 2009.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.feature_files import (
    ARRAYS_FILE,
    Array,
    Columns,
    arrays_to_bytes,
    digest_of,
    taken,
)
from dml_fast.errors import UserError, check_choice, reason
from dml_fast.foreign import Unfit, content, json_value, reading, typed

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

KIND = "text"
VOCABULARY_FILE = "vocabulary.json"
ONE_TEXT = ("text",)
ARGUMENTS = ("arg1", "arg2")

_MOST_TERMS = 50_000  # of a level, the most frequent: the components of each take 800 bytes
_EDGE = 3  # words at each end of an argument
_SEED = 0  # of the randomized SVD, whose result is stored
_NEGLIGIBLE = 1e-5  # singular values below this share of the first are rounding errors of float32
_TOKEN = re.compile(r"\w+|[^\w\s]")

_log = logging.getLogger("dml_fast")


class _Recipe(NamedTuple):
    """How a level sees a row.

    Attributes:
        options: of scikit-learn's vectorizer; one without ``analyzer`` takes words.
        of_arguments: whether it needs two arguments.
    """

    options: dict[str, Any]
    of_arguments: bool


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def word_pairs(arguments: Sequence[str]) -> list[str]:
    """Return each word of the first argument with each of the second, as ``w1|w2``, once."""
    first, second = (sorted(set(_tokens(text))) for text in arguments)
    return [f"{a}|{b}" for a in first for b in second]


def edges(arguments: Sequence[str]) -> list[str]:
    """Return the 1- to 3-grams of the first and of the last three words, with their position."""
    found = []
    for number, text in enumerate(arguments, 1):
        words = _tokens(text)
        for end, part in (("first", words[:_EDGE]), ("last", words[-_EDGE:])):
            for length in range(1, len(part) + 1):
                for start in range(len(part) - length + 1):
                    gram = " ".join(part[start : start + length])
                    found.append(f"{number} {end}: {gram}")
    return found


_RECIPES = {
    "words": _Recipe({"ngram_range": (1, 2), "min_df": 2}, False),
    "chars": _Recipe({"analyzer": "char_wb", "ngram_range": (2, 4), "min_df": 2}, False),
    "args": _Recipe({"ngram_range": (1, 2), "min_df": 2}, True),
    "pairs": _Recipe({"analyzer": word_pairs, "min_df": 5}, True),
    "edges": _Recipe({"analyzer": edges, "min_df": 2}, True),
}
LEVELS = tuple(_RECIPES)


def check_levels(levels: Sequence[str], columns: Sequence[str], where: str) -> None:
    """Refuse levels that do not exist, that occur twice, or that the columns do not allow.

    Args:
        levels: names.
        columns: of the file: ``text``, or ``arg1`` and ``arg2``.
        where: the file, for the message.

    Raises:
        UserError: the first such level.
    """
    for place, level in enumerate(levels):
        check_choice("--levels", level, LEVELS)
        if level in levels[:place]:
            raise UserError(f"--levels names {level} twice: name it once")
        if _RECIPES[level].of_arguments and tuple(columns) != ARGUMENTS:
            possible = ",".join(name for name in LEVELS if not _RECIPES[name].of_arguments)
            raise UserError(
                f"--levels {level} needs columns arg1 and arg2, and {where} has text alone: give "
                f"--levels {possible}, or such a file"
            )


@dataclass(frozen=True, eq=False)
class _Level:
    """One level, fitted: F terms, d components, D numbers a row.

    Attributes:
        name: of the level.
        terms: F, in the order of their numbers.
        idf: (F,) the inverse document frequencies.
        components: (F, d) float32.
        scale: (D,) float32, the deviation of each number over the training rows; D is d, or 4 d
            for ``args``.
    """

    name: str
    terms: tuple[str, ...]
    idf: Array
    components: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    def transform(self, columns: Columns) -> npt.NDArray[np.float32]:
        """Return (N, D) float32."""
        raw = _combine([self._project(part) for part in documents(self.name, columns)])
        return raw / self.scale

    def _project(self, texts: Sequence[Any]) -> npt.NDArray[np.float32]:
        return _projected(self._vectorizer, texts, self.components)

    @cached_property
    def _vectorizer(self) -> TfidfVectorizer:
        return _vectorizer_of(self.name, self.terms, self.idf)


def documents(level: str, columns: Columns) -> list[list[Any]]:
    """Return what a level's vectorizer reads: one list of N texts, or for ``args`` two."""
    if ARGUMENTS[0] not in columns:
        return [columns["text"].tolist()]
    both = [columns[name].tolist() for name in ARGUMENTS]
    if level == "args":
        return both
    pairs = list(zip(*both, strict=True))
    return [pairs if _RECIPES[level].of_arguments else ["\n".join(pair) for pair in pairs]]


def _combine(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    if len(parts) == 1:
        return parts[0]
    a, b = parts
    return np.concatenate([a, b, a * b, np.abs(a - b)], axis=1)


def _projected(
    vectorizer: TfidfVectorizer, texts: Sequence[Any], components: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return (N, d) float32; each row is a sum in the order of its terms, whatever the others."""
    if not len(texts):
        return np.zeros((0, components.shape[1]), dtype=np.float32)
    found: npt.NDArray[np.float32] = vectorizer.transform(texts).astype(np.float32) @ components
    return found


def _vectorizer_of(level: str, terms: Sequence[str], idf: Array) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second to import

    vectorizer = TfidfVectorizer(
        **_RECIPES[level].options,
        sublinear_tf=True,
        dtype=np.float32,
        vocabulary={term: number for number, term in enumerate(terms)},
    )
    vectorizer.idf_ = idf
    return vectorizer


def _fit_level(name: str, columns: Columns, dim: int, where: str) -> _Level:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    options = _RECIPES[name].options
    parts = documents(name, columns)
    texts = [text for part in parts for text in part]
    vectorizer = TfidfVectorizer(**options, dtype=np.float32, max_features=_MOST_TERMS)
    try:
        vectorizer.fit(texts)
    except ValueError as error:  # it has no type of its own
        raise UserError(
            f"{where} has no {name} that occur in {options['min_df']} of its training rows "
            f"({reason(error)}): give more rows, or another level with --levels"
        ) from None
    terms = tuple(map(str, vectorizer.get_feature_names_out()))
    again = _vectorizer_of(name, terms, vectorizer.idf_)
    weights = again.transform(texts).astype(np.float32)
    wanted = max(1, dim // 2) if name == "args" else dim
    svd = TruncatedSVD(min(wanted, *weights.shape), random_state=_SEED)
    with threadpool_limits(1):  # with more threads BLAS rounds differently
        svd.fit(weights)
    strengths = svd.singular_values_
    kept = max(1, int((strengths > _NEGLIGIBLE * strengths[0]).sum()))
    components = np.ascontiguousarray(svd.components_[:kept].T, dtype=np.float32)
    if kept < wanted:
        _log.info(
            "level %s has %d dimensions and not %d: its %d terms in %d texts allow no more",
            *(name, kept, wanted, len(terms), len(texts)),
        )
    raw = _combine([_projected(again, part, components) for part in parts])
    deviation = raw.astype(np.float64).std(axis=0).astype(np.float32)
    scale = np.where(deviation > 0, deviation, np.float32(1))
    return _Level(name, terms, vectorizer.idf_, components, scale)


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """Levels that were fitted together: see `dml_fast.data.features.Features`.

    Attributes:
        columns: that a row needs: ``text``, or ``arg1`` and ``arg2``.
        levels: V of them.
    """

    columns: tuple[str, ...]
    levels: tuple[_Level, ...]

    @classmethod
    def fit(cls, columns: Columns, levels: Sequence[str], dim: int, where: str) -> TextFeatures:
        """Fit levels to the training rows.

        Args:
            columns: ``text`` (N,), or ``arg1`` and ``arg2``.
            levels: names, checked by `check_levels`.
            dim: of the SVD; half of it for each argument of ``args``.
            where: the file, for messages.

        Raises:
            UserError: a level finds no terms.
        """
        needed = ARGUMENTS if ARGUMENTS[0] in columns else ONE_TEXT
        return cls(needed, tuple(_fit_level(name, columns, dim, where) for name in levels))

    @property
    def names(self) -> tuple[str, ...]:
        """The levels, which are the views of a row."""
        return tuple(level.name for level in self.levels)

    @property
    def digest(self) -> str:
        """The SHA-256 of all that is stored."""
        return digest_of(self._arrays(), self._vocabulary())

    def transform(self, columns: Columns) -> tuple[npt.NDArray[np.float32], ...]:
        """Return one view for each level, (N, D_v) float32.

        Raises:
            UserError: a column is missing.
        """
        for name in self.columns:
            if name not in columns:
                raise UserError(
                    f"the rows have no column {name}: give them with {' and '.join(self.columns)}, "
                    "as the run was trained"
                )
        return tuple(level.transform(columns) for level in self.levels)

    def files(self) -> dict[str, bytes]:
        """Return what a run folder holds, by name."""
        words = json.dumps(self._vocabulary(), indent=0).encode()
        return {ARRAYS_FILE: arrays_to_bytes(self._arrays()), VOCABULARY_FILE: words}

    def _vocabulary(self) -> dict[str, list[str]]:
        return {level.name: list(level.terms) for level in self.levels}

    def _arrays(self) -> dict[str, Array]:
        arrays: dict[str, Array] = {
            "kind": np.array(KIND),
            "columns": np.array(self.columns),
            "levels": np.array(self.names),
        }
        for level in self.levels:
            parts = {"idf": level.idf, "components": level.components, "scale": level.scale}
            arrays |= {f"{level.name}.{name}": part for name, part in parts.items()}
        return arrays


def load(folder: Path, arrays: Mapping[str, Array]) -> TextFeatures:
    """Take features from the arrays of ``features.npz``, and ``vocabulary.json`` beside it.

    Raises:
        UserError: one of them is damaged, or they do not fit each other.
    """
    path = folder / VOCABULARY_FILE
    found = json_value(content(path), path)
    with reading(path):
        words: dict[str, list[str]] = typed(found, dict[str, list[str]], "it")
    with reading(folder / ARRAYS_FILE):
        columns = tuple(map(str, taken(arrays, "columns", str, -1)))
        if columns not in (ONE_TEXT, ARGUMENTS):
            raise Unfit(f"its columns are {columns}")
        names = tuple(map(str, taken(arrays, "levels", str, -1)))
        try:
            check_levels(names, columns, "it")
        except UserError as error:
            raise Unfit(str(error)) from None
        if not names or names != tuple(words):
            raise Unfit(f"its levels are not those of {VOCABULARY_FILE}")
        return TextFeatures(columns, tuple(_level_of(arrays, name, words[name]) for name in names))


def _level_of(arrays: Mapping[str, Array], name: str, terms: Sequence[str]) -> _Level:
    """Raise Unfit if the arrays of a level do not fit each other and its terms."""
    count = len(terms)
    if len(set(terms)) != count or not count:
        raise Unfit(f"level {name} has a term twice, or none")
    idf = arrays.get(f"{name}.idf")
    kind = np.float64 if idf is not None and idf.dtype == np.float64 else np.float32
    components = taken(arrays, f"{name}.components", np.float32, count, -1)
    width = components.shape[1] * (4 if name == "args" else 1)
    scale = taken(arrays, f"{name}.scale", np.float32, width)
    if not width or not (scale > 0).all():
        raise Unfit(f"level {name} has no dimension, or one that is not above 0")
    idf = taken(arrays, f"{name}.idf", kind, count)
    return _Level(name, tuple(terms), idf, np.ascontiguousarray(components), scale)
