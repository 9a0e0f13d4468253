"""What every session promises, on every database, stand-alone and through a gateway."""
