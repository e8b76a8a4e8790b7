"""One comparison from its options to its tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from dml_fast.comparison.measures import Ids, Measured, churn, measured
from dml_fast.comparison.methods import Contestant
from dml_fast.comparison.runs import entries, train_all
from dml_fast.comparison.tables import Result, cost_times, to_json, to_markdown
from dml_fast.engine.precision import pick_device
from dml_fast.foreign import shown
from dml_fast.reporting.console import PlainConsole, at_the_end, set_up_logging
from dml_fast.runs.files import atomic_write
from dml_fast.runs.folder import held

_log = logging.getLogger("dml_fast")


def compare(found: tuple[Contestant, ...], seeds: Sequence[int], folder: Path, jobs: int) -> int:
    """Train what is not there yet, measure all, write and print the tables.

    Runs are ordinary folders ``METHOD-sSEED``. Those of one seed have the same initial weights,
    order of rows, augmentation and wrong labels. What was stopped or killed goes on by the same
    call, to the same tables; more seeds or methods may be added.

    Args:
        found: what is compared; the first is the baseline.
        seeds: at least one.
        folder: of the comparison.
        jobs: runs at a time; 0 chooses.

    Returns:
        The exit code: 0, or 128 + the signal that stopped it.

    Raises:
        UserError: the folder, a run in it or the data does not allow it.
        TrainingError: a run failed.
    """
    set_up_logging(PlainConsole(stderr=True))
    device = found[0].config.device
    with held(folder, "compares methods in"):
        runs = entries(found, seeds, folder)
        chosen = pick_device(device)
        if code := train_all(runs, jobs, chosen if chosen.type == "cuda" else None):
            _log.warning("stopped; the same command goes on")
            return code
        figures: dict[str, list[Measured]] = {one.name: [] for one in found}
        answers: dict[str, list[Ids]] = {one.name: [] for one in found}
        for entry in runs:
            mine, said = measured(entry, device)
            figures[entry.method].append(mine)
            if said is not None:
                answers[entry.method].append(said)
        changed = {name: churn(said) for name, said in answers.items()}
        result = Result(found, tuple(seeds), figures, changed)
        text = to_markdown(result)
        files = {"compare.md": text, "compare.json": json.dumps(to_json(result), indent=2) + "\n"}
        for name, content in files.items():
            with atomic_write(folder / name) as file:
                file.write(content.encode())
        with at_the_end(str(folder / "compare.png"), "the same command draws it again"):
            from dml_fast.comparison.plot import plot_differences  # takes a second to import

            plot_differences(folder / "compare.png", result)
    print(text)
    print(cost_times(result))
    print(f"\nwrote {', '.join(shown(folder / name) for name in (*files, 'compare.png'))}")
    return 0
