"""Rankings of a gallery and their scores, over the C++ core; numpy, without torch."""
