"""What `up` writes down for later commands of the same user, and where. Loads no Ray."""
