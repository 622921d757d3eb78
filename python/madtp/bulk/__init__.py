"""Millions of rows: where they are read from, who decodes them, where results go, and callables for engines that have
their own answers to all of that (Ray Data, Daft).

A source is cut into *shards*, which depend on the source alone: a tar is one, of lists (folders, JSON Lines, CSV,
parquet) each so many rows are. Results of a shard are files of their own, and a shard is done or to be done again. Any
number of processes share the shards of a run, each row is answered by exactly one of them.
"""
