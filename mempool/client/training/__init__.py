"""A trainer's step on one table: what it consists of, how it is carried out, and what ties autograd to it."""
