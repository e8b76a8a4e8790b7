"""From options to a trained cohort: what is built, the loop, and what it saves."""
