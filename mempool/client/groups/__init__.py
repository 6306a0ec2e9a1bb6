"""Groups of ranks that step together: joining, meeting, and what a step is for the leader and for the others."""
