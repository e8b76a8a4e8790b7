"""Options of steps and updates that do not fit together. Nothing here imports torch."""

from __future__ import annotations

from dml_fast.config.fields import Options, names_in
from dml_fast.errors import UserError

NO_DECAY = ("norm", "bias")


def check_steps(config: Options) -> None:
    """Refuse parts that a batch does not have, and unknown kinds of parameters.

    Args:
        config: the options, each within its bounds.

    Raises:
        UserError: it names the option, its value and what to do.
    """
    kinds = names_in(config.no_decay)
    if {*kinds} - {*NO_DECAY} or len({*kinds}) < len(kinds):
        raise UserError(f"--no-decay is {config.no_decay!r}: give norm, bias, or norm,bias")
    if config.accumulate == 1:
        return
    if config.update == "alternating":
        raise UserError(
            f"--accumulate {config.accumulate} means nothing with --update alternating, whose "
            "students predict each whole batch again: give simultaneous"
        )
    if config.small_loss:
        raise UserError(
            f"--accumulate is {config.accumulate} and --small-loss {config.small_loss} compares "
            "the rows of a whole batch: leave out one or the other"
        )
    check_parts(config, 1)


def check_parts(config: Options, columns: int) -> None:
    """Refuse a number of parts that does not divide the rows of a process.

    Args:
        config: the options.
        columns: of the mesh, which divide each batch first.

    Raises:
        UserError: it names the option, its value and what to do.
    """
    parts, rows = config.accumulate, config.batch_size // columns
    if parts == 1:
        return
    over = f", over {columns} columns {rows}" if columns > 1 else ""
    if rows % parts:
        raise UserError(
            f"--accumulate is {parts} and does not divide --batch-size {config.batch_size}{over}: "
            "give a divisor"
        )
    together = config.num_instances if config.data.startswith("market1501:") else 0
    if together and rows // parts % together:
        raise UserError(
            f"--accumulate {parts} makes parts of {rows // parts} images, which is no multiple of "
            f"--num-instances {together}: give a smaller --accumulate, or a larger --batch-size"
        )
    if config.triplet_weight and rows // parts == together:
        raise UserError(
            f"--accumulate {parts} makes parts of one identity, and --triplet-weight "
            f"{config.triplet_weight} compares identities: give a smaller --accumulate, or a "
            "larger --batch-size"
        )
