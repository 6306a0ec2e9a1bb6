"""Rows that are experts: what is asked of them, its gradients, and both under autograd."""
