"""Calls on the caller's own thread, where shards are in this process or on this host; all else is ``routing``'s."""
