"""Checkpoints of a pool: the moment, the parts, the manifest; and tables that are made of one."""
