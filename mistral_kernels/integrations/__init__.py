"""Integrations into other libraries' models. Each module imports the library it is for."""
