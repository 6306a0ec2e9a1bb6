"""Values to bytes and back: one codec per message."""
