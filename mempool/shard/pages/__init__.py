"""What a shard stores: arenas of pages, a table's storage, pages that come and go."""
