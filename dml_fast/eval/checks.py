"""What can be known of a search before anything is computed for it."""

from __future__ import annotations

from dml_fast.errors import UserError
from dml_fast.ranking.reranking import K1


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
