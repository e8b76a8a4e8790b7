"""Write a student, or all together, in a format for deployment, read it back and compare."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.loaders.assemble import input_of
from dml_fast.errors import UserError, first_line
from dml_fast.foreign import shown
from dml_fast.machine import sync_folder
from dml_fast.models.ensemble import EnsembleNet
from dml_fast.models.hashing import CodedNet
from dml_fast.models.safetensors_files import HEADER
from dml_fast.runs.exported import Apply, Exported, TrainedEnsemble, TrainedStudent
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import writing
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, open_data, say_whose

logger = logging.getLogger(__name__)

_ROWS = 32


class Check(NamedTuple):
    """The outcome of a comparison.

    Attributes:
        difference: the largest absolute difference between the outputs of file and student; a
            bit of a code that differs counts by how far its u is from 0.
        tolerance: the largest difference that is accepted.
    """

    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the file computes what the student does; false too for a difference of NaN."""
        return self.difference <= self.tolerance


def export_student(
    run: Run,
    name: str,
    kind: str,
    which: str,
    out: str,
    allow_code: Collection[str] = (),
    weights: str = "student",
) -> bool:
    """Export a student of a run, or all, and print by how much the file's output differs.

    Args:
        run: the run.
        name: ``best``, the student's number, or ``ensemble``.
        kind: the format: safetensors, pt2 or onnx.
        which: the checkpoint: best or last.
        out: the file; "" for a name in the run folder.
        allow_code: the functions, as ``package.module:function``, that may build students.
        weights: student, or ema for the average of its weights.

    Returns:
        Whether the file computes what the student does; if not, it is not kept.
    """
    trained = Trained.load(run, which, allow_code, weights)
    say_whose(run, weights)
    best = trained.best
    if name == "best" and best is None:
        raise UserError(
            f"{run.checkpoint(which)} is from before the first validation, so no student is best "
            "yet: give --student with a number"
        )
    facts = trained.facts
    student: Exported
    if name == "ensemble":
        student, stem, source = _ensemble(trained), "ensemble", range(len(facts.inputs))
        archs = ", ".join(f"{k} ({arch})" for k, arch in enumerate(trained.archs))
        who = f"ensemble of students {archs}"
    else:
        k = best if name == "best" and best is not None else int(name)
        student = TrainedStudent(trained.model(k), trained.archs[k], facts, facts.view_of(k))
        stem, source = f"student_{k}", range(k, k + 1)
        who = f"student {k} ({trained.archs[k]})"
    suffix = "-ema" if weights == "ema" else ""
    path = Path(out) if out else run.folder / f"{stem}-{which}{suffix}.{kind}"
    inputs, rows = _rows(run, facts, source)
    check = export(student, kind, path, *inputs)
    comparison = (
        f"largest difference of {' and '.join(student.outputs)} {check.difference:.2g}, "
        f"tolerance {check.tolerance:.2g}, "
        f"on {len(inputs[0])} {rows}, in batches of 1 and {len(inputs[0]) + 1}"
    )
    if check.passed:
        whose = "averages of weights, " if weights == "ema" else ""
        print(f"wrote {shown(path)}: {whose}{shown(who)} of {which}.pt; {comparison}")
    else:
        logger.error("%s was not kept, %s differs: %s", path, who, comparison)
    return check.passed


def _ensemble(trained: Trained) -> TrainedEnsemble:
    """Return all students of a run.

    Raises:
        UserError: the numbers of one are not finite, so that there is no mean.
    """
    models = tuple(map(trained.model, range(len(trained.archs))))
    for k, model in enumerate(models):
        if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
            raise UserError(
                f"student {k}'s weights in {trained.path} are not finite, so the ensemble gives no "
                "numbers: give another --checkpoint, or --student with a number"
            )
    return TrainedEnsemble(models, trained.archs, trained.facts)


def _rows(run: Run, facts: DataFacts, students: Sequence[int]) -> tuple[tuple[Tensor, ...], str]:
    """Return up to 32 rows for the comparison as each student reads them, and words for them."""
    specs = [facts.input_of(k) for k in students]
    kind = specs[0].kind
    try:
        data = open_data(run)
    except UserError as error:
        logger.warning("no real %ss to compare on: %s", kind, error)
        g = torch.Generator().manual_seed(0)
        made = (torch.randn((_ROWS, *spec.tensor_shape), generator=g) for spec in specs)
        return tuple(made), f"random {kind}s"
    batches = evaluation_batches(
        data.val,
        batch_size=_ROWS,
        mean=facts.mean,
        std=facts.std,
        device="cpu",
        channels_last=False,
        students=students,
    )
    found = next(batches).inputs
    inputs = tuple(input_of(found, place) for place in range(len(students)))
    return inputs, f"{kind}s of the validation split"


def export(student: Exported, kind: str, out: Path, *inputs: Tensor) -> Check:
    """Write a student, or all, to a file, which stays only if it computes what they do.

    Args:
        student: what to export.
        kind: the format: safetensors, pt2 or onnx.
        out: the file; an old one is replaced only by one that passes.
        inputs: (N, ...) float32 for the comparison, one for each input of the network: normalised
            images, or vectors.

    Raises:
        UserError: a package is missing, the network cannot be traced, or ``out`` cannot be written.
    """
    write, read = {
        "safetensors": (_write_safetensors, _read_safetensors),
        "pt2": (_write_pt2, _read_pt2),
        "onnx": (_write_onnx, _read_onnx),
    }[kind]
    exact = kind == "safetensors"  # the same code runs on the same weights
    with writing(out, "give another file with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export.", dir=out.parent) as folder:
            draft = Path(folder) / out.name
            write(student, inputs, draft)
            check = _compare(student, read(student, draft), inputs, exact)
            if check.passed:
                with draft.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(draft, out)
                sync_folder(out.parent)
    return check


@torch.inference_mode()
def _compare(student: Exported, apply: Apply, inputs: Sequence[Tensor], exact: bool) -> Check:
    network, difference, scale = student.network, 0.0, 0.0
    # two sizes, to see that tracing has not fixed the number of rows
    for batch in ([x[:1] for x in inputs], [torch.cat([x, x[:1]]) for x in inputs]):
        expected, got = _several(network(*batch)), _several(apply(*batch))
        if [one.shape for one in got] != [one.shape for one in expected]:
            return Check(float("nan"), 0.0)
        gaps = [(expected[0] - got[0]).abs().max(), torch.tensor(difference)]
        if isinstance(network, CodedNet | EnsembleNet) and len(expected) > 1:
            gaps.append(_code_gap(network.before_signs(*batch), expected[1], got[1]))
        # torch's max keeps a NaN, Python's may drop it
        difference = torch.stack(gaps).max().item()
        scale = max(scale, expected[0].abs().max().item())
    return Check(difference, 0.0 if exact else student.tolerance * max(1.0, scale))


def _several(found: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _code_gap(u: Tensor, expected: Tensor, got: Tensor) -> Tensor:
    """Return the largest |u| of a bit that differs, 0-d: infinite for a bit that is filled up."""
    size = F.pad(u.abs(), (0, -u.shape[1] % 8), value=torch.inf)  # (N, whole bytes of bits)
    places = torch.arange(7, -1, -1)
    differ = ((expected ^ got)[..., None] >> places & 1).flatten(1)
    return torch.where(differ > 0, size, 0.0).max()


def _write_safetensors(student: Exported, _: Sequence[Tensor], path: Path) -> None:
    student.save(path)


def _read_safetensors(student: Exported, path: Path) -> Apply:
    return student.load(path)


def _trace(student: Exported, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """Trace the network as a graph for any number of rows."""
    network = student.network
    # torch.export makes a size of 1 a constant
    example = tuple(torch.cat([x[:1], x[:1]]) for x in inputs)
    sizes = tuple({0: torch.export.Dim("batch")} for _ in example)
    shapes = (sizes,) if isinstance(network, EnsembleNet) else sizes  # it takes *inputs
    try:
        return torch.export.export(network, example, dynamic_shapes=shapes)
    except Exception as error:  # a network that cannot be traced may raise anything
        raise UserError(
            f"{student.name} cannot be traced by torch.export ({first_line(error)}): "
            "give --format safetensors"
        ) from error


def _write_pt2(student: Exported, inputs: Sequence[Tensor], path: Path) -> None:
    program = _trace(student, inputs)
    content = io.BytesIO()  # torch's own file writer ends the process when a disk is full
    torch.export.save(program, content, extra_files={f"{HEADER}.json": student.header})
    path.write_bytes(content.getvalue())


# Both readers get the content: torch and ONNX Runtime refuse a path that is not UTF-8.
def _read_pt2(_: Exported, path: Path) -> Apply:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _write_onnx(student: Exported, inputs: Sequence[Tensor], path: Path) -> None:
    _need("onnx", "onnxscript", "onnxruntime")
    program = torch.onnx.export(
        _trace(student, inputs),
        dynamo=True,
        input_names=list(student.input_names),
        output_names=list(student.outputs),
        verbose=False,
    )
    assert program is not None  # None is for dynamo=False
    program.model.metadata_props[HEADER] = student.header
    program.save(path, external_data=False)


def _read_onnx(student: Exported, path: Path) -> Apply:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def apply(*inputs: Tensor) -> tuple[Tensor, ...]:
        rows = (x.contiguous().numpy() for x in inputs)
        found = session.run(None, dict(zip(student.input_names, rows, strict=True)))
        return tuple(map(torch.from_numpy, found))

    return apply


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'dml_fast[export]'")
