"""``python -m shardgate.cli``: the same as ``shardgate``."""

from shardgate.cli import main

main()
