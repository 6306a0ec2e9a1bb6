"""Reads of a table as it was at one version: moments that readers have pinned, kept while training goes on."""
