"""Conversations rendered once, into a folder of shards that training reads.

A shard holds the conversations of a stretch of the data, cut by the data alone, so that the folder
is the same byte for byte with any number of processes. Shards are written whole or not at all, and
each knows the digest of its lines: after an interruption the same run reads the data again, keeps
the shards that are finished, and makes the others.
"""
