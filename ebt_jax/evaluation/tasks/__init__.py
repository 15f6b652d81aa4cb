"""Benchmark tasks: items from files, scored by likelihood, energy or what is said."""
