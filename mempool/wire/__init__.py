"""The wire: messages and frames, the methods of the services, status <-> errors, the IO loop, channels.

Leaves to others what is said over it: ``client`` plans and retries, ``server`` validates and answers.
"""
