"""Which rows to label next, and which labels to doubt: a cohort as a committee."""
