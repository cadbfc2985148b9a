"""The commands: each reads its options and says which library function to call."""
