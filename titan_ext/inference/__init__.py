"""Evaluation of and generation with a trained model: perplexity, tasks and text."""
