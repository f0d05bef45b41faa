"""The rotator on the command line."""
