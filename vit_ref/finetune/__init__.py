"""Fine-tuning: the training step."""
