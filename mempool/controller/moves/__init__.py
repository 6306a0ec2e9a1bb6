"""How a rescale is carried out: rounds, their size, and what is not yet where it should be."""
