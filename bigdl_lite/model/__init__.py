"""nn.Module to flat tensors, and back."""
