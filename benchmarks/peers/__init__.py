"""Rivals of the consensus model on the same data and the same time: `python -m cdiff.benchmarks.peers --help` (docs/benchmarks.md).

slices     the data in memory, and batches as functions of (seed, step)
networks   the networks, of MONAI's parts
unets      the U-Net peers: what each learns from, its loss, what it draws
drawn      what a model drew of a case, beside its annotators' masks
training   one trainer for all U-Net peers
diffusion  the diffusion peers: cdiff's own trainer, exporter and evaluation
score      all of them on one scale
"""
