"""What stands in a benchmark, and where it is found in the data."""
