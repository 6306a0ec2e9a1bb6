"""Code generated from ``protos/mempool/wire/v1/`` by ``protos/generate.py``: do not edit, and import only in ``wire``."""
