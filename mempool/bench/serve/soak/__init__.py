"""A shard at saturation for minutes, whose clients are killed and replaced: what it holds then, and afterwards.

python -m mempool.bench.serve.soak --minutes 10
"""
