"""User errors: how they are reported, and how the errors of the parser and of constructors become one line."""
