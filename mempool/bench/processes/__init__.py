"""Processes that a benchmark starts beside itself: how they start, answer, end, the CPU they spend, what they serve."""
