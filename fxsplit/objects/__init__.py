"""What a model is made of: its modules, containers and values walked through, copied, compared and remembered."""
