"""Utilities for files, schemas, ranges, errors and signals, without imports from the package."""
