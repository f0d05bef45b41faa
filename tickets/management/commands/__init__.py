"""The commands of the tickets app; Django finds each by its module's name."""
