"""Mistral decoder: configuration, rolling cache, layers, the model, decode engines, sampling."""
