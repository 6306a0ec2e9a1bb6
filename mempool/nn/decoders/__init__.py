"""Memory in models that others built: their feed-forward layers are found by what modules they have, given a memory
beside them or in their place, and what that adds is saved beside the model. Needs no library of models."""

from mempool.nn.decoders.fitting import retrofit
from mempool.nn.decoders.saving import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "retrofit", "save_pretrained"]
