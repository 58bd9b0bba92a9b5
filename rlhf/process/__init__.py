"""The Python process of a run: memory, garbage collection, time limits and its rank. Imports no torch."""
