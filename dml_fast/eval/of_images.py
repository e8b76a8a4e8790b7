"""A finished run applied to rows without labels: classes and probabilities, or embeddings."""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.loaders.assemble import Batch, input_of
from dml_fast.engine.precision import Precision, pick_device
from dml_fast.errors import UserError
from dml_fast.eval.classification import evaluating
from dml_fast.eval.given_images import GivenImages, find_images, known_identities
from dml_fast.eval.given_rows import read_given_rows
from dml_fast.eval.of_run import run_precision, run_students
from dml_fast.eval.prediction_files import STDOUT, Row, new_file, prediction_file
from dml_fast.eval.retrieval import Features, concatenate
from dml_fast.models.embedding import classifier_of
from dml_fast.models.hashing import HashNet, signs
from dml_fast.models.heads import Head
from dml_fast.reporting.console import progress
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, say_whose

TOP = 5  # classes, by default
_log = logging.getLogger("dml_fast")


class Predicted(NamedTuple):
    """What was done.

    Attributes:
        rows: how many rows were predicted.
        what: what they are, images or rows.
        left_out: the files that could not be decoded, each with the reason.
        by: the students, the checkpoint, the precision and the device, in words.
        arrays: the shape of each array in the file of features, by its name.
    """

    rows: int
    what: str
    left_out: dict[Path, str]
    by: str
    arrays: dict[str, tuple[int, ...]]


def predict_run(
    folder: Path,
    given: Sequence[Path],
    *,
    student: str = "best",
    top: int = TOP,
    checkpoint: str = "best",
    allow_code: Collection[str] = (),
    device: str = "auto",
    batch_size: int = 512,
    out: str = "",
    features: Path | None = None,
    weights: str = "student",
) -> Predicted:
    """Predict the classes of images, vectors or texts, or embed them, with a run's students.

    Rows are prepared and students run as in `dml_fast.eval.of_run.evaluate_run`: the rows of a
    split get the predictions that were counted there.

    Args:
        folder: the run's.
        given: image files and folders; for a run that learned vectors or texts, files of its form.
        student: best, ensemble, or a student's number.
        top: how many classes to write for each row; all where a row may have several labels.
        checkpoint: best, last or previous.
        allow_code: the functions, as ``package.module:function``, that may build students.
        device: auto, cpu, cuda or cuda:N.
        batch_size: rows at a time.
        out: the file for classes, .csv or .jsonl; - for CSV on the standard output; "" for none.
        features: the .npz file for embeddings, or None.
        weights: student, or ema for the averages of their weights.

    Raises:
        UserError: no such run, checkpoint, student, device or file; no image can be decoded, or a
            file is not of the run's form; a student gives no numbers or no embeddings; a file
            cannot be written.
    """
    run = Run.open(folder)
    if run.facts.of_pairs:
        raise UserError(
            f"{run.folder} learned displacements of pairs: python -m dml_fast.register finds that "
            "of two images"
        )
    paths = find_images(given) if run.facts.of_images else []
    trained = Trained.load(run, checkpoint, allow_code, weights)
    say_whose(run, weights)
    config, facts = run.config, trained.facts
    if facts.several_labels and top != TOP:
        raise UserError(
            f"--top is {top} and a row of {run.folder} may have several labels, whose "
            "probabilities are all written: leave it out"
        )
    chosen = _chosen(student, trained, run)
    precision = run_precision(config, pick_device(device))
    models = run_students(trained, config, precision, chosen)
    images = GivenImages.for_run(paths, config, facts) if facts.of_images else None
    part = images.as_set() if images else read_given_rows(given, run)
    names = part.names if images is None else [str(path) for path in paths]
    batches = evaluation_batches(
        part,
        batch_size=batch_size,
        mean=facts.mean,
        std=facts.std,
        device=precision.device,
        channels_last=config.channels_last,
        students=chosen,
    )
    top, together = min(top, len(facts.classes)), student == "ensemble"
    kept: list[int] = []
    key = "path" if images else "name"
    embedded: list[list[Features]] = []
    arrays: dict[str, NDArray[Any]] = {}
    with ExitStack() as stack:
        array_file = features and stack.enter_context(new_file("--features", features))
        columns = facts.classes if facts.several_labels else ()
        write = stack.enter_context(prediction_file(out, top, key, columns)) if out else None
        done = stack.enter_context(progress("predicting", len(names), hidden=out == STDOUT))
        parts = stack.enter_context(closing(_parts(models, batches, precision, bool(features))))
        for seen in parts:
            if write is not None:
                here = [names[index] for index in seen.ids]
                if facts.several_labels:
                    write(_rows_of_labels(here, seen.logits, facts.classes))
                else:
                    write(_rows(here, seen.logits, facts.classes, top, together))
            kept += seen.ids
            embedded.append(seen.features)
            done(seen.ids[-1] + 1)
        if images and not kept:
            raise _none_decoded(images)
        if array_file:
            found = [paths[index] for index in kept] if images else []
            arrays = {
                **_features(embedded, chosen, together, facts.head),
                "names": np.array([names[index] for index in kept]),
                **(known_identities(found, config, facts) if images else {}),
            }
            np.savez(array_file, **arrays)  # type: ignore[arg-type]
    if images:
        images.report_sizes(config)
    archs = ", ".join(f"{k} ({trained.archs[k]})" for k in chosen)
    whose = f"ensemble of students {archs}" if together else f"student {archs}"
    if weights == "ema":
        whose = f"averages of weights, {whose}"
    return Predicted(
        rows=len(kept),
        what="images" if images else "rows",
        left_out=images.corrupt.reasons if images else {},
        by=f"{whose}; {checkpoint}.pt of {run.folder}; {precision} on {precision.device}",
        arrays={name: array.shape for name, array in arrays.items()},
    )


def _chosen(student: str, trained: Trained, run: Run) -> list[int]:
    """Return the numbers of the students that ``--student`` means."""
    numbers = list(range(len(trained.archs)))
    if student == "ensemble":
        return numbers
    if student == "best":
        if trained.best is None:
            raise UserError(
                f"the checkpoint of {run.folder} is from before the first validation, so no "
                "student is best yet: give --student with a number, or ensemble"
            )
        return [trained.best]
    if student not in map(str, numbers):
        raise UserError(
            f"--student is {student[:20]!r} and {run.folder} has {len(numbers)} students: give "
            f"best, ensemble, or a number from 0 to {numbers[-1]}"
        )
    return [int(student)]


class _Part(NamedTuple):
    """What K students say about B rows.

    Attributes:
        ids: (B,) the indices of the rows; B is at least 1.
        logits: K tensors (B, C) float32.
        features: K arrays (B, D) float32, of a hash head the bits as +1 and -1; none unless asked
            for.
    """

    ids: list[int]
    logits: list[Tensor]
    features: list[Features]


@torch.inference_mode()
def _parts(
    models: Sequence[nn.Module], batches: Generator[Batch], precision: Precision, embed: bool
) -> Generator[_Part]:
    """Run students as `dml_fast.eval.classification.evaluate` does."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        stack.enter_context(evaluating(models))
        for k, model in enumerate(models if embed else ()):
            if isinstance(model, HashNet):
                hook = model.norm.register_forward_hook(
                    lambda *args, k=k: seen.update({k: signs(args[2])})
                )
            else:
                layer = classifier_of(model)
                hook = layer.register_forward_pre_hook(
                    lambda _, args, k=k: seen.update({k: args[0]})
                )
            stack.callback(hook.remove)
        for batch in batches:
            if not len(batch.ids):  # none of its files can be decoded
                continue
            with precision.autocast():
                logits = [
                    m(input_of(batch.inputs, place)).float() for place, m in enumerate(models)
                ]
            features = [seen[k].float().cpu().numpy() for k in range(len(models)) if embed]
            yield _Part(batch.ids.tolist(), logits, features)


def _rows(
    names: Sequence[str],
    logits: Sequence[Tensor],
    classes: Sequence[str],
    top: int,
    together: bool,
) -> list[Row]:
    """Return the ``top`` likeliest classes of each row.

    The first is the one that `dml_fast.eval.classification.evaluate` counts, also among equals: by
    the logits of one student, by the mean probabilities of students ``together``.

    Raises:
        UserError: a student's logits are not finite.
    """
    probabilities = torch.stack([z.softmax(1) for z in logits]).mean(0)  # (B, C)
    _check_finite(names, probabilities)
    scores = probabilities if together else logits[0]
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top]
    shares = probabilities.gather(1, order).cpu().numpy()
    return [
        # the shortest decimal of each float32
        Row(name, [classes[c] for c in found], [float(str(p)) for p in row])
        for name, found, row in zip(names, order.tolist(), shares, strict=True)
    ]


def _rows_of_labels(
    names: Sequence[str], logits: Sequence[Tensor], classes: Sequence[str]
) -> list[Row]:
    """Return the probability of each class of each row, the mean of the students'.

    Raises:
        UserError: a student's logits are not finite.
    """
    probabilities = torch.stack([z.sigmoid() for z in logits]).mean(0)  # (B, C)
    _check_finite(names, torch.stack(list(logits)).sum(0))
    found = probabilities.cpu().numpy()
    return [
        Row(name, classes, [float(str(p)) for p in row])
        for name, row in zip(names, found, strict=True)
    ]


def _check_finite(names: Sequence[str], numbers: Tensor) -> None:
    if len(wrong := (~numbers.isfinite()).any(1).nonzero()):
        raise UserError(
            f"the logits for {names[int(wrong[0])]} are not finite, so it has no class: give "
            "another --student or --checkpoint"
        )


def _features(
    embedded: Sequence[Sequence[Features]], chosen: Sequence[int], together: bool, head: Head
) -> dict[str, NDArray[Any]]:
    """Return the embeddings of N rows: of one student, or of all at length 1, side by side.

    Of a hash head these are codes: packed bits, of all students side by side, and their number.

    Args:
        embedded: for each batch, the features of K students.
        chosen: the students' numbers.
        together: whether the ensemble's are wanted.
        head: of the students.

    Raises:
        UserError: no student's embeddings are finite.
    """
    students = [np.concatenate(parts) for parts in zip(*embedded, strict=True)]
    good = []
    for k, features in zip(chosen, students, strict=True):
        if np.isfinite(features).all():
            good.append(features)
        else:
            _log.warning("student %d's embeddings are not finite: it is left out", k)
    if not good:
        raise UserError("no embeddings are finite: give another --student or --checkpoint")
    if head.kind == "hash":
        bits = np.concatenate(good, axis=1) > 0
        return {"features": np.packbits(bits, axis=1), "bits": np.array(bits.shape[1])}
    return {"features": concatenate(good) if together else good[0]}


def _none_decoded(images: GivenImages) -> UserError:
    path, why = next(iter(images.corrupt.reasons.items()))
    return UserError(
        f"none of {len(images)} files can be decoded, such as {path} ({why}): give image files"
    )
