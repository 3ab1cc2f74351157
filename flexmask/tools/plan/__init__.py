"""What a run would cost and save, counted before any GPU hour."""
