"""The command line: argv and environment enter here, once, and become values."""
