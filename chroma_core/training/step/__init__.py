"""What one training step is made of: noise, objective, optimizer, learning rate, average."""
