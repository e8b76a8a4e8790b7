"""Write one student in a format for deployment, read it back and compare its output."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.loaders.assemble import input_of
from dml_fast.errors import UserError, first_line
from dml_fast.foreign import shown
from dml_fast.machine import sync_folder
from dml_fast.models.embedding import EmbeddingNet
from dml_fast.models.hashing import CodedNet, HashNet
from dml_fast.models.safetensors_files import HEADER
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import writing
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, open_data
from dml_fast.runs.weights import header_of, load_student, save_student, view_of

logger = logging.getLogger(__name__)

_ROWS = 32


class TrainedStudent(NamedTuple):
    """A student to export.

    Attributes:
        model: in evaluation mode, on the CPU.
        arch: its name for ``create_model``.
        facts: of the data that it was trained on.
        view: which of the data's views it reads.
    """

    model: nn.Module
    arch: str
    facts: DataFacts
    view: int = 0

    @property
    def input_name(self) -> str:
        """What the network gets: images or vectors."""
        return f"{self.facts.inputs[self.view].kind}s"

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the network returns: logits, and codes of a hash head; of identities embeddings."""
        if self.facts.head.kind == "hash":
            return "logits", "codes"
        return ("embeddings" if self.facts.retrieval else "logits",)

    @property
    def network(self) -> nn.Module:
        """The network that is exported: one that finds identities goes without its classifier."""
        if isinstance(self.model, HashNet):
            return CodedNet(self.model).eval()
        if isinstance(self.model, EmbeddingNet) and self.facts.retrieval:
            return nn.Sequential(self.model.backbone, self.model.neck).eval()
        return self.model

    @property
    def header(self) -> str:
        """The JSON that each format carries beside the network."""
        return header_of(self.arch, self.facts, self.view)


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


Apply = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def export_student(
    run: Run,
    name: str,
    kind: str,
    which: str,
    out: str,
    allow_code: Collection[str] = (),
    weights: str = "student",
) -> bool:
    """Export a student of a run, and print by how much the file's output differs.

    Args:
        run: the run.
        name: ``best``, or the student's number.
        kind: the format: safetensors, pt2 or onnx.
        which: the checkpoint: best or last.
        out: the file; "" for a name in the run folder.
        allow_code: the functions, as ``package.module:function``, that may build students.
        weights: student, or ema for the average of its weights.

    Returns:
        Whether the file computes what the student does; if not, it is not kept.
    """
    trained = Trained.load(run, which, allow_code, weights)
    best = trained.best
    if name == "best" and best is None:
        raise UserError(
            f"{run.checkpoint(which)} is from before the first validation, so no student is best "
            "yet: give --student with a number"
        )
    k = best if name == "best" and best is not None else int(name)
    facts = trained.facts
    student = TrainedStudent(trained.model(k), trained.archs[k], facts, facts.view_of(k))
    suffix = "-ema" if weights == "ema" else ""
    path = Path(out) if out else run.folder / f"student_{k}-{which}{suffix}.{kind}"
    inputs, source = _rows(run, facts, k)
    check = export(student, kind, path, inputs)
    comparison = (
        f"largest difference of {' and '.join(student.outputs)} {check.difference:.2g}, "
        f"tolerance {check.tolerance:.2g}, "
        f"on {len(inputs)} {source}, in batches of 1 and {len(inputs) + 1}"
    )
    if check.passed:
        print(
            f"wrote {shown(path)}: {'average of ' if suffix else ''}student {k} "
            f"({shown(student.arch)}) of {which}.pt; {comparison}"
        )
    else:
        logger.error("%s was not kept, student %d differs: %s", path, k, comparison)
    return check.passed


def _rows(run: Run, facts: DataFacts, student: int) -> tuple[Tensor, str]:
    """Return up to 32 inputs of a student for the comparison, and words for what they are."""
    spec = facts.input_of(student)
    try:
        data = open_data(run)
    except UserError as error:
        logger.warning("no real %ss to compare on: %s", spec.kind, error)
        made = torch.randn((_ROWS, *spec.tensor_shape), generator=torch.Generator().manual_seed(0))
        return made, f"random {spec.kind}s"
    batches = evaluation_batches(
        data.val,
        batch_size=_ROWS,
        mean=facts.mean,
        std=facts.std,
        device="cpu",
        channels_last=False,
        students=(student,),
    )
    return input_of(next(batches).inputs, 0), f"{spec.kind}s of the validation split"


def export(student: TrainedStudent, kind: str, out: Path, inputs: Tensor) -> Check:
    """Write a student to a file, which stays only if it computes what the student does.

    Args:
        student: what to export.
        kind: the format: safetensors, pt2 or onnx.
        out: the file; an old one is replaced only by one that passes.
        inputs: (N, ...) float32 for the comparison: normalised images, or vectors.

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
def _compare(student: TrainedStudent, apply: Apply, inputs: Tensor, exact: bool) -> Check:
    network, difference, scale = student.network, 0.0, 0.0
    # two sizes, to see that tracing has not fixed the number of rows
    for batch in (inputs[:1], torch.cat([inputs, inputs[:1]])):
        expected, got = _several(network(batch)), _several(apply(batch))
        if [one.shape for one in got] != [one.shape for one in expected]:
            return Check(float("nan"), 0.0)
        gaps = [(expected[0] - got[0]).abs().max(), torch.tensor(difference)]
        if isinstance(student.model, HashNet):
            gaps.append(_code_gap(student.model, batch, expected[1], got[1]))
        # torch's max keeps a NaN, Python's may drop it
        difference = torch.stack(gaps).max().item()
        scale = max(scale, expected[0].abs().max().item())
    return Check(difference, 0.0 if exact else 1e-4 * max(1.0, scale))


def _several(found: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _code_gap(net: HashNet, inputs: Tensor, expected: Tensor, got: Tensor) -> Tensor:
    """Return the largest |u| of a bit that differs, 0-d: infinite for a bit that is filled up."""
    size = net.features_and_logits(inputs)[0].abs()  # (N, b)
    size = F.pad(size, (0, -net.bits % 8), value=torch.inf)
    places = torch.arange(7, -1, -1)
    differ = ((expected ^ got)[..., None] >> places & 1).flatten(1)
    return torch.where(differ > 0, size, 0.0).max()


def _write_safetensors(student: TrainedStudent, _: Tensor, path: Path) -> None:
    save_student(path, student.model.state_dict(), student.arch, student.facts, student.view)


def _read_safetensors(student: TrainedStudent, path: Path) -> Apply:
    model, header = load_student(path, allow_code=[student.arch])
    facts = DataFacts.from_json(header, "its header")
    return TrainedStudent(model, header["arch"], facts, view_of(header, facts)).network


def _trace(student: TrainedStudent, inputs: Tensor) -> torch.export.ExportedProgram:
    """Trace the network as a graph for any number of rows."""
    example = torch.cat([inputs[:1], inputs[:1]])  # torch.export makes a size of 1 a constant
    try:
        return torch.export.export(
            student.network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    except Exception as error:  # a network that cannot be traced may raise anything
        raise UserError(
            f"{student.arch} cannot be traced by torch.export ({first_line(error)}): "
            "give --format safetensors"
        ) from error


def _write_pt2(student: TrainedStudent, inputs: Tensor, path: Path) -> None:
    program = _trace(student, inputs)
    content = io.BytesIO()  # torch's own file writer ends the process when a disk is full
    torch.export.save(program, content, extra_files={f"{HEADER}.json": student.header})
    path.write_bytes(content.getvalue())


# Both readers get the content: torch and ONNX Runtime refuse a path that is not UTF-8.
def _read_pt2(_: TrainedStudent, path: Path) -> Apply:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _write_onnx(student: TrainedStudent, inputs: Tensor, path: Path) -> None:
    _need("onnx", "onnxscript", "onnxruntime")
    program = torch.onnx.export(
        _trace(student, inputs),
        dynamo=True,
        input_names=[student.input_name],
        output_names=list(student.outputs),
        verbose=False,
    )
    assert program is not None  # None is for dynamo=False
    program.model.metadata_props[HEADER] = student.header
    program.save(path, external_data=False)


def _read_onnx(student: TrainedStudent, path: Path) -> Apply:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def apply(inputs: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {student.input_name: inputs.contiguous().numpy()})
        return tuple(map(torch.from_numpy, found))

    return apply


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'dml_fast[export]'")
