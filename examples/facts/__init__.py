"""The parts of `train_facts.py`; its docstring says in which order to read them."""
