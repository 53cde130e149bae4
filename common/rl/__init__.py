"""What samples, scores and updates a policy."""
