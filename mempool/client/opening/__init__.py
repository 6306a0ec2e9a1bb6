"""The ways into a pool: connecting, only asking, making a table; and the connection that all who came in share."""
