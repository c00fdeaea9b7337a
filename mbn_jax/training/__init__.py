"""The framework: from a configuration and a folder to a trained network."""
