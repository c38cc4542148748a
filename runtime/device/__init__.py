"""The device layer under the GPU engines: context and memory, our kernels, graph capture, and the chain that runs on the GPU."""
