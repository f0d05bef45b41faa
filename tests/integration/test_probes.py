"""The probes, on a real server."""
