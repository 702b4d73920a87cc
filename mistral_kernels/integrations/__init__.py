"""Integrations into other libraries. Each module imports the library that it integrates with."""
