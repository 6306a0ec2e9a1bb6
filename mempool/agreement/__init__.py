"""How the processes of a pool agree on what was trained, as pure state machines: events in, actions out.

Clients, shards and the controller carry out what these say; see ``docs/agreement.md``. Sees ``types`` and ``errors``
alone: no clock, no loop, no message is read or sent here.
"""
