"""The commands, and the contents of the page and of the metrics."""
