"""Drop-in replacements for torchft's classes."""
