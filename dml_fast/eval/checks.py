"""What can be known of a search before anything is computed for it."""

from __future__ import annotations

from dml_fast.data import RetrievalSet
from dml_fast.errors import UserError
from dml_fast.ranking.labels import check_search
from dml_fast.ranking.reranking import K1


def known_protocol(images: RetrievalSet, protocol: str) -> str:
    """Return the protocol that a search can follow: market1501 without cameras is ``all``."""
    return "all" if images.cams is None and protocol == "market1501" else protocol


def check_images(images: RetrievalSet, protocol: str, option: str = "--protocol") -> None:
    """Refuse a search in which no query has a match.

    Args:
        images: the queries and the gallery.
        protocol: market1501, cuhk03 or all.
        option: by which the user gives another one.

    Raises:
        UserError: none has.
    """
    q, pids, cams = images.queries, images.labels, images.cams
    check_search(
        pids[:q],
        pids[q:],
        None if cams is None else cams[:q],
        None if cams is None else cams[q:],
        camera_rule=cams is not None and protocol != "all",
        without_cameras=f"{option} all",
    )


def check_reranking(images: int) -> None:
    """Refuse re-ranking of too few images.

    Args:
        images: queries and gallery together.

    Raises:
        UserError: there are fewer than an image and its neighbours.
    """
    if images <= K1:
        raise UserError(
            f"--rerank compares each image with its {K1} nearest, and queries and gallery are only "
            f"{images} images together: leave it out, or give at least {K1 + 1}"
        )
