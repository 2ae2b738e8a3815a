"""The command line: dispatch, parser, errors and one function per command. Nothing else imports it."""
