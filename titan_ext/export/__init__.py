"""A trained model as a folder that Hugging Face's libraries read, and that training can start from."""
