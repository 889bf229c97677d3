"""What the processes of a run tell each other beside its tensors, and what a cluster tells them."""
