"""mistral_kernels inside other libraries' models. Each module imports the library it is for."""
