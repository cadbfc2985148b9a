"""What a run leaves on disk: files that are whole or not there, and checkpoints to go on from."""
