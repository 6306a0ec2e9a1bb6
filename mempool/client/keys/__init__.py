"""A client's part of keys in the pool: which rows of which table they are, what is chosen by them, their gradient."""
