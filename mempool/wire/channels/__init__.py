"""Connections and the IO loop they live on."""
