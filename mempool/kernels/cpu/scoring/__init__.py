"""Scoring on the CPU: scores of keys, the best of them, product keys and flat keys."""
