"""Planner, bounded queue and workers: how ranges flow, whoever plans and writes them."""
