"""Checkpoints as files: manifests, parts that shards write, reading for any placement, removal; tables as single files.

Talks to no pool: it writes and reads what it is handed. What only looks or commits loads no torch.
"""
