"""Records as HTML pages of one file each."""
