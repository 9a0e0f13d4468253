"""Moves of slots from shard to shard: that nothing is lost, whoever is at it and whatever fails."""
