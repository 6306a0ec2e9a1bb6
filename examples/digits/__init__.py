"""The parts of `digits_in_three_ways.py`; its docstring says in which order to read them."""
