"""The papers' comparison: one trunk, seven kinds of blocks, equal FLOPs; facts and a small language model."""
