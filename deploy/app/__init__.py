"""An HTTP application on Shardgate: conversations of many tenants, kept on many databases."""
