"""Benchmarks of served pools: clients and shards as processes of one host."""
