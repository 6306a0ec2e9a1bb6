"""Gathers under torch's autograd and compiler. Sending is the link's, of ``client.training``."""
