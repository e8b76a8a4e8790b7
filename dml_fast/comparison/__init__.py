"""Methods of training compared over seeds: runs, measures, statistics, tables."""
