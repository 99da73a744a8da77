"""The command line (top floor): thin commands over the library."""
