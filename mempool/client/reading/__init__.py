"""Tables as they were at one version: pins, and what is read by them."""
