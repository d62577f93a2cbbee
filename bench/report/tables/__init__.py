"""Tables and sentences: a file for each kind of rows."""
