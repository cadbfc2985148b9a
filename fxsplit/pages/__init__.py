"""Records -> one-file HTML."""
