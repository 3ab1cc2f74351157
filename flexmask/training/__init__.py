"""A run on the Hugging Face Trainer: exact, and resumable after a kill at any moment."""
