"""The command line: `armorm NAME` is the function of that name in the module of that name."""
