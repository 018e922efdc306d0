"""What a trained model is worth: perplexity on held-out text, and tasks."""
