"""What one parameter update is; the training loop does not know which."""
