"""Operations take effect once, whatever happens to the wire, the server and the caller."""
