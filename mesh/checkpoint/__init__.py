"""What outlives a run that was ended: complete checkpoints, and the way back from them."""
