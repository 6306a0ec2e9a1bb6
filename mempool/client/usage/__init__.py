"""How a table is used: asked of its shards, and slots that nobody uses begun anew."""
