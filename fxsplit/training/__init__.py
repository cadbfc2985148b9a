"""Phases, epochs and batches of a plan through one executor."""
