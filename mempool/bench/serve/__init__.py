"""`mempool bench serve`: look-ups of served pools, clients and shards as processes of one host, beside other libraries.

``run`` measures one client (``lookups``), more and more shards (``shards``), many clients (``load``, ``client``).
``contention``, ``counting`` and ``soak`` are commands of their own.
"""
