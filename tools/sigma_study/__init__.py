"""What the noise levels of training decide, measured."""
