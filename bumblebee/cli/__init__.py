"""The command line: dispatch, parsing, errors and one module per command. Only ``bumblebee.__main__`` imports it."""
