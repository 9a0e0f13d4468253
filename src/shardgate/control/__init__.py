"""What operators do to a keyspace. The data path never imports it."""
