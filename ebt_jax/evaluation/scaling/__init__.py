"""Scaling laws: points from finished runs, fits with intervals, tables, plots."""
