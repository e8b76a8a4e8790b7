"""What people see: the console, tables, plots and comparisons of runs."""
