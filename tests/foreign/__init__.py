READY_MADE = "ROTATOR_FOREIGN_ENVIRONMENT"
"""The name of a variable with an environment that has the packages, so that they need not be installed."""
