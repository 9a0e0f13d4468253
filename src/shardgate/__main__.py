"""``python -m shardgate``: the same as ``shardgate``."""

from shardgate.cli import main

main()
