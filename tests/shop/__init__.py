"""An application whose tables are not the rotator's: the models that the tests rotate."""
