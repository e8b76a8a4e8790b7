"""What people see of runs: lines on the console, tables, plots and comparisons."""
