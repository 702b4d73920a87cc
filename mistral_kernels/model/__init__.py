"""The Mistral decoder: configuration, rolling cache, layers, the model and sampling."""
