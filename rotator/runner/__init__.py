"""One run of a rotation: planner, queue, workers, and the run from acquiring a rotation to leaving it."""
