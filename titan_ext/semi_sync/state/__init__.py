"""What a rank holds: views of its tensors, synced states and parameters, outer optimizers."""
