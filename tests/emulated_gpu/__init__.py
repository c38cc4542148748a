"""A GPU of PyTorch's that is not there: its tensors lie in host memory, and only what a GPU does not allow is refused."""
