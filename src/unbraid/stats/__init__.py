"""Intervals, nulls, corrections, effect sizes and splits: a thin layer over NumPy and SciPy."""
