"""The commands of the tickets app."""
