"""Folders of models in Hugging Face's format: what their ``config.json`` says and what their weight files hold."""
