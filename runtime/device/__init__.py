"""The GPU under the engines: context and memory, our kernels, graph capture, and the chain that runs on it."""
