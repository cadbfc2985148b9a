"""Images read ahead by worker processes, and files of images."""
