"""The autograd functions with their hand-written backward passes, and the same as `torch.library` operators."""
