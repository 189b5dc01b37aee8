"""How fast the program is, beside a textbook version of itself: `python -m tests.benchmark`."""
