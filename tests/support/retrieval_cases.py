"""Evaluations from the command line, and what they are compared with."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import json_of

from dml_fast import cli
from dml_fast.data import RetrievalSet
from dml_fast.evaluate import main
from dml_fast.ranking.oracle import rank_query, valid_items
from dml_fast.runs.weights import load_student

as_json = partial(json_of, main)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.run(main, [str(a) for a in arguments]) == 2
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]  # a logger of an earlier test's may complain before
    assert printed.out == "" and last.startswith("error: ")
    return last


def embeddings(folder: Path, images: RetrievalSet, *, unit: bool = True) -> list[np.ndarray]:
    """Of both students at the end of the run, at length 1, and of both side by side.

    Without ``unit`` those of the students are as they come.
    """
    raw, found = [], []
    for path in sorted(folder.glob("student_?.safetensors")):
        model, facts = load_student(path)
        mean, std = (np.reshape(facts[key], (1, -1, 1, 1)) for key in ("mean", "std"))
        x = torch.from_numpy(((images.images / 255 - mean) / std).astype(np.float32))
        with torch.no_grad():
            f = model.neck(model.backbone(x)).double().numpy()  # type: ignore[operator]
        raw.append(f)
        found.append(f / np.linalg.norm(f, axis=1, keepdims=True))
    return [*(found if unit else raw), np.concatenate(found, axis=1)]


def set_oracle(
    f: np.ndarray, images: RetrievalSet, how: str, t: float, *, camera_rule: bool = True
) -> dict[str, float]:
    """Mean scores of the query sets, (identity, camera), by loops; identities are the gallery.

    Junk is left out; distractors, which have identity 0, are a set each.
    """
    assert images.cams is not None
    q, scores = images.queries, []
    pids, cams, found = images.labels[q:], images.cams[q:], f[q:]
    names = [(p, i if p == 0 else -1) for i, p in enumerate(pids)]
    gallery = [[j for j, other in enumerate(names) if other == s] for s in dict.fromkeys(names)]
    gallery = sorted((s for s in gallery if pids[s[0]] >= 0), key=lambda s: pids[s[0]] or 9999)
    whose = list(zip(images.labels[:q], images.cams[:q], strict=True))
    for pid, cam in sorted(set(whose)):
        mine = f[:q][[owner == (pid, cam) for owner in whose]]
        sets = [
            [j for j in s if not (camera_rule and (pids[j], cams[j]) == (pid, cam))]
            for s in gallery
        ]
        kept = [s for s in sets if s]
        if how == "mutual_information":
            lengths = np.linalg.norm(f, axis=1).max()
            cosines = found / lengths, mine / lengths  # all have this length
            density = np.array(
                [[np.mean(np.exp((cosines[0][s] @ x - 1) / t)) for s in kept] for x in cosines[1]]
            )
            distances = -np.log(density / density.mean(1, keepdims=True)).sum(0)
        else:
            assert how == "centroid"
            ends = [found[s].mean(0) for s in kept], mine.mean(0)
            distances = np.array([-e @ ends[1] / np.linalg.norm(e) for e in ends[0]])
        match = np.array([pids[s[0]] == pid for s in kept])
        of_sets = np.array([pids[s[0]] for s in kept])
        scores.append(rank_query(distances, match, of_sets, ties="stable", max_rank=20))
    first = np.array([s["first_rank"] for s in scores])
    means = {"mAP": np.mean([s["ap"] for s in scores])}
    return means | {f"rank{k}": np.mean(first <= k) for k in (1, 5)}


def oracle(f: np.ndarray, images: RetrievalSet, *, camera_rule: bool = True) -> dict[str, float]:
    """Mean scores of the queries, one query after the other."""
    assert images.cams is not None
    q, scores = images.queries, []
    pids, cams = images.labels[q:], images.cams[q:]
    for row, pid, cam in zip(f[:q], images.labels[:q], images.cams[:q], strict=True):
        keep = valid_items(pids, cams, pid, cam, junk_pid=-1, camera_rule=camera_rule)
        match = pids[keep] == pid
        distances = 1 - f[q:][keep] @ row
        scores.append(rank_query(distances, match, pids[keep], ties="stable", max_rank=20))
    means = {key: np.mean([s[key] for s in scores]) for key in ("ap", "ap_trapezoid", "inp")}
    first = np.array([s["first_rank"] for s in scores])
    named = {"mAP": means["ap"], "mAP_trapezoid": means["ap_trapezoid"], "mINP": means["inp"]}
    return named | {f"rank{k}": np.mean(first <= k) for k in (1, 5, 10)}
