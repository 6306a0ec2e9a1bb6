"""Tensors on the wire: bodies, and the frames that hold them."""
