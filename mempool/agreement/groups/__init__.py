"""Groups of ranks that step together: their home, and what they arrive with there."""
