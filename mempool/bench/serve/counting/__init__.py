"""What a look-up costs that no clock shows: system calls (``calls``, by strace), and bytes copied (``copies``).

python -m mempool.bench.serve.counting
"""
