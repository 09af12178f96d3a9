"""Complete, verified checkpoints, and resuming from them."""
