"""A finished run evaluated on a split of its data or of other data; nothing is printed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.data import PairSet, RetrievalSet
from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.loaders.assemble import Batch
from dml_fast.data.sets import Part
from dml_fast.engine.precision import Precision, keep_in_full_precision, pick_device
from dml_fast.errors import UserError, check_choice
from dml_fast.eval.checks import check_images, check_reranking, known_protocol
from dml_fast.eval.classification import ClassScores, Ids, evaluate
from dml_fast.eval.displacements import displacement_scores
from dml_fast.eval.hamming import CodeSearch, search_codes, write_codes
from dml_fast.eval.retrieval import evaluate_retrieval
from dml_fast.eval.sets import SetRule, set_facts
from dml_fast.eval.several_labels import LabelScores, evaluate_labels
from dml_fast.ranking.result import RankingResult
from dml_fast.reporting.console import at_the_end
from dml_fast.runs.files import check_place
from dml_fast.runs.folder import Run
from dml_fast.runs.history import ACCURACY, MAP
from dml_fast.runs.trained import Trained, open_data, open_split, say_whose

LIST_LENGTH = 10  # gallery images in a ranked list
_WORST = 5  # confusions to report

_log = logging.getLogger("dml_fast")


def evaluate_run(
    folder: Path,
    *,
    data: str = "",
    split: str = "test",
    checkpoint: str = "best",
    allow_code: Collection[str] = (),
    device: str = "auto",
    batch_size: int = 512,
    protocol: str = "auto",
    reranked: bool = False,
    lists: int = 0,
    out: Path | None = None,
    sets: tuple[str, float] | None = None,
    hamming: bool = False,
    codes: Path | None = None,
    answers: list[Ids] | None = None,
    weights: str = "student",
) -> dict[str, Any]:
    """Measure a run's students and their ensemble: accuracies, or how well they find identities.

    Args:
        folder: the run's.
        data: a data set in place of the run's own, or "".
        split: train, val or test.
        checkpoint: best, last or previous.
        allow_code: the functions, as ``package.module:function``, that may build students.
        device: auto, cpu, cuda or cuda:N.
        batch_size: images at a time.
        protocol: whose rules a search follows: market1501, cuhk03, all; auto: as in training.
        reranked: whether to correct the distances with mutual neighbours (`dml_fast.eval.rerank`).
        lists: how many queries' ranked lists to draw, of the ensemble.
        out: where to draw them.
        sets: the reduction and the temperature by which to rank sets of images, see
            `dml_fast.eval.sets`; None ranks single images.
        hamming: whether to rank by the codes of students with a hash head, see
            `dml_fast.eval.hamming.search_codes`. Of a run that learned classes, the split searches
            among the training and validation rows that are not in it.
        codes: the .npz file for these codes, or None.
        answers: gets the classes that each student, and the ensemble, predicts, (K + 1, N) int64.
        weights: student, or ema for the averages of their weights.

    Returns:
        What ``--json`` prints: shares in 0..1, and what they were measured on.

    Raises:
        UserError: no such run, checkpoint, split or device; data that does not fit; retrieval asked
            of a run that learned classes, or codes of one without; no queries, no query with a
            match, or no student with finite embeddings; there is no place for the picture or the
            codes. A picture that fails later is named in one line, and ``ranked_lists`` is None.
    """
    check_choice("split", split, ("train", "val", "test"))
    check_choice("checkpoint", checkpoint, ("best", "last", "previous"))
    if lists and out is not None:
        check_place(out, "--out")
    if codes is not None:
        check_place(codes, "--codes")
    run = Run.open(folder)
    config = run.config
    if hamming and run.facts.head.kind != "hash":
        raise UserError(
            f"--hamming ranks codes, and the students of {run.folder} have a head of kind "
            f"{run.facts.head.kind}, which gives none: train with --head hash, or leave it out"
        )
    if not config.retrieval:
        ranked = {"--protocol": protocol != "auto", "--rerank": reranked, "--ranked-lists": lists}
        ranked["--sets"] = sets is not None
        for flag, value in ranked.items():
            if value:
                raise UserError(f"{flag} ranks, and {run.folder} learned classes: leave it out")
    trained = Trained.load(run, checkpoint, allow_code, weights)
    say_whose(run, weights)
    precision = run_precision(config, pick_device(device))
    parts = _parts(run, data, split, hamming)
    images = parts[0][0]
    if config.retrieval:
        if not isinstance(images, RetrievalSet):
            raise UserError("the train split has no queries: give --split test or val")
        usual = config.val_protocol
        if sets and protocol == "auto" and usual == "cuhk03":
            _log.info("sets are ranked by protocol market1501: cuhk03 counts one image an identity")
            usual = "market1501"
        protocol = known_protocol(images, usual if protocol == "auto" else protocol)
        check_images(images, protocol)
        if reranked:
            check_reranking(len(images))
    models = run_students(trained, config, precision)

    def batches(part: Part) -> Generator[Batch]:
        return evaluation_batches(
            part,
            batch_size=batch_size,
            mean=trained.facts.mean,
            std=trained.facts.std,
            device=precision.device,
            channels_last=config.channels_last,
            students=range(len(models)),
        )

    picture = _Picture(lists, out)
    if hamming:
        search = search_codes(
            models, *parts, batches, precision, protocol=protocol, topk=picture.topk
        )
        found = _of_codes(search, images, picture)
        if codes is not None:
            write_codes(codes, search, () if config.retrieval else trained.facts.classes)
        found.facts["codes"] = None if codes is None else str(codes)
    elif config.retrieval:
        how: dict[str, Any] = {"protocol": protocol, "reranked": reranked}
        how["sets"] = SetRule(*sets) if sets else None
        found = _search(models, batches(images), images, precision, run.folder, how, picture)
    elif trained.facts.several_labels:
        found = _label(models, batches(images), precision, trained.facts.classes)
    else:
        area = images.search if isinstance(images, PairSet) else 0
        classes = trained.facts.classes
        found = _classify(models, batches(images), precision, classes, answers, area)
        # not images - labelled: files that cannot be decoded are left out too
        found.facts["unlabelled"] = int((images.labels < 0).sum())
    line = trained.validation if weights == config.weights else None  # what it measured
    score = (MAP if config.retrieval or trained.facts.several_labels else ACCURACY).key
    key = "val_error_px" if isinstance(images, PairSet) else score
    return {
        "run": str(run.folder),
        "checkpoint": checkpoint,
        "step": trained.step,
        "epoch": trained.validation["epoch"] if trained.validation else 0,
        "weights": weights,
        **({"changes": run.changes} if run.changes else {}),
        "data": data or config.data,
        "split": split,
        "images": len(images),
        "device": str(precision.device),
        "precision": str(precision),
        **found.facts,
        "students": [
            {
                "arch": trained.archs[k],
                "parameters": sum(p.numel() for p in models[k].parameters()),
                key: line["students"][k].get(key) if line else None,
                **scores,
            }
            for k, scores in enumerate(found.students)
        ],
        "best_student": trained.best,
        **found.ensemble,
    }


class _Found(NamedTuple):
    """Measurements, as entries of the result.

    Attributes:
        facts: about the search; none for classification.
        students: the scores of each.
        ensemble: its scores.
    """

    facts: dict[str, Any]
    students: Sequence[dict[str, Any]]
    ensemble: dict[str, Any]


def _classify(
    models: Sequence[nn.Module],
    batches: Iterator[Batch],
    precision: Precision,
    classes: Sequence[str],
    answers: list[Ids] | None,
    search: int,
) -> _Found:
    """Classify; of pairs, with a ``search`` above 0, measure the errors in pixels too."""
    found = evaluate(models, batches, precision, len(classes), detailed=True)
    if answers is not None and found.answers is not None:
        answers.append(found.answers)

    def entries(scores: ClassScores, prefix: str = "") -> dict[str, Any]:
        assert scores.calibration is not None
        recall = dict(zip(classes, scores.recall, strict=True))
        named = {"accuracy": scores.accuracy, "f1": scores.f1, **asdict(scores.calibration)}
        return {prefix + name: value for name, value in (named | {"recall": recall}).items()}

    students = [entries(scores) for scores in found.students]
    ensemble = entries(found.ensemble, "ensemble_")
    if search:
        assert found.answers is not None
        assert found.target is not None
        *errors, of_ensemble = displacement_scores(found.answers, found.target, search)
        for entry, error in zip(students, errors, strict=True):
            entry |= error.to_json()
        ensemble |= of_ensemble.to_json("ensemble_")
    confused = [
        {"class": classes[one], "as": classes[other], "rows": rows}
        for one, other, rows in found.confusions(_WORST)
    ]
    return _Found({"labelled": found.images}, students, ensemble | {"confusions": confused})


def _label(
    models: Sequence[nn.Module],
    batches: Iterator[Batch],
    precision: Precision,
    classes: Sequence[str],
) -> _Found:
    """Measure the average precision of each class where rows may have several labels."""
    found = evaluate_labels(models, batches, precision, len(classes))

    def entries(scores: LabelScores, prefix: str = "") -> dict[str, Any]:
        by_class = dict(zip(classes, scores.ap, strict=True))
        named = {"mAP": scores.mAP, "exact": scores.exact, "average_precision": by_class}
        return {prefix + name: value for name, value in named.items()}

    facts = {"labelled": found.images, "absent": [classes[c] for c in found.absent]}
    students = [entries(scores) for scores in found.students]
    return _Found(facts, students, entries(found.ensemble, "ensemble_"))


class _Picture(NamedTuple):
    """Ranked lists to draw.

    Attributes:
        lists: of how many queries.
        out: the file.
    """

    lists: int
    out: Path | None

    @property
    def topk(self) -> int:
        """How many nearest images are needed."""
        return LIST_LENGTH if self.lists else 0

    def draw(self, images: Part, found: RankingResult) -> str | None:
        """Draw them; return the file's name, or None where there is none."""
        if self.lists and self.out is not None:
            with at_the_end(str(self.out), "the scores are complete"):
                # matplotlib takes a second to import
                from dml_fast.reporting.ranked_lists import draw_ranked_lists

                assert isinstance(images, RetrievalSet)
                draw_ranked_lists(self.out, images, found, self.lists)
                return str(self.out)
        return None


def _parts(run: Run, spec: str, split: str, hamming: bool) -> tuple[Sequence[Part], Sequence[Part]]:
    """Return what is evaluated, and where rows of classes search for others by their codes."""
    if not hamming or run.config.retrieval:
        return [open_split(run, spec, split)], []
    data = open_data(run, spec)
    parts = {"train": data.train, "val": data.val, "test": data.test}
    queries = parts.pop(split)
    if queries is None:
        raise UserError(f"{spec or run.config.data} has no test split: give --split val")
    return [queries], [part for name in ("train", "val") if (part := parts.get(name)) is not None]


def _of_codes(search: CodeSearch, images: Part, picture: _Picture) -> _Found:
    ensemble = search.found.ensemble
    assert ensemble is not None
    queries, gallery = len(search.queries.names), len(search.gallery.names)
    facts = {
        "images": queries + gallery if isinstance(images, RetrievalSet) else queries,
        "queries": queries,
        "gallery": gallery,
        "unlabelled": search.unlabelled,
        "n_valid": ensemble.n_valid,
        "protocol": search.protocol,
        "ties": ensemble.ties,
        "bits": search.bits,
        "ranked_lists": picture.draw(images, ensemble),
    }
    students = [_shares(result) for result in search.found.students]
    return _Found(facts, students, {"ensemble": _shares(ensemble)})


def _search(
    models: Sequence[nn.Module],
    batches: Iterator[Batch],
    images: Part,
    precision: Precision,
    folder: Path,
    how: dict[str, Any],
    picture: _Picture,
) -> _Found:
    assert isinstance(images, RetrievalSet)
    found = evaluate_retrieval(models, batches, images, precision, **how, topk=picture.topk)
    if found.ensemble is None:
        raise UserError(
            f"no student of {folder} gives embeddings that are numbers, so there is nothing to "
            "rank: evaluate an earlier checkpoint with --checkpoint"
        )
    facts = {
        "queries": images.queries,
        "gallery": len(images) - images.queries,
        "n_valid": found.ensemble.n_valid,
        **how,
        "sets": set_facts(images, how["sets"]) if how["sets"] else None,
        "ranked_lists": picture.draw(images, found.ensemble),
    }
    students = [_shares(result) for result in found.students]
    return _Found(facts, students, {"ensemble": _shares(found.ensemble)})


def _shares(result: RankingResult | None) -> dict[str, float | None]:
    """Return the scores to report, each None for a student that diverged."""
    if result is None:
        return dict.fromkeys(("mAP", "mAP_trapezoid", "mINP", "rank1", "rank5", "rank10"))
    means = {name: getattr(result, name) for name in ("mAP", "mAP_trapezoid", "mINP")}
    return means | {f"rank{k}": float(result.cmc[k - 1]) for k in (1, 5, 10)}


def run_students(
    trained: Trained, config: TrainConfig, precision: Precision, chosen: Sequence[int] | None = None
) -> list[nn.Module]:
    """Build students on their device, in evaluation mode and in training's precision.

    Args:
        trained: of the run.
        config: of the run.
        precision: of `run_precision`.
        chosen: the numbers of the students; by default all.
    """
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    models = []
    for k in range(len(trained.archs)) if chosen is None else chosen:
        model = trained.model(k).to(precision.device)
        model = model.to(memory_format=layout)  # type: ignore[call-overload]
        keep_in_full_precision(model, precision)
        models.append(model)
    return models


def run_precision(config: TrainConfig, device: torch.device) -> Precision:
    """Return the run's own precision, but fp32, which loses nothing, for fp16 on a CPU."""
    amp = config.amp
    if amp and config.amp_dtype == "fp16" and device.type == "cpu":
        _log.warning("the run used fp16, which a CPU lacks: evaluating in fp32")
        amp = False
    return Precision.choose(amp, config.amp_dtype, device)
