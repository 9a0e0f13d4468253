"""The gateway itself: putting it together, creating keyspaces, outages, listing, health."""
