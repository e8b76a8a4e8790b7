"""Rank a gallery and score the rankings, in numpy and C++; only `tiles` uses torch."""
