"""The command line of fxsplit: parse, call one library function, render."""
