"""The project side: models, fields, generators, filters, connections and receivers."""
