"""The way between two processes of one host and one user: small messages over a Unix socket, bodies in shared memory.

``memory`` is what bodies lie in, ``framing`` how messages look, ``handshake`` how two processes agree on it, ``line``
the two ends once they have. Which calls go this way is ``methods``' to say; gRPC stays the contract, and the way of
everybody else.
"""
