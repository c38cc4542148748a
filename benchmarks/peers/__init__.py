"""Rivals of the consensus model on the same data and the same time: `python -m cdiff.benchmarks.peers --help` (docs/benchmarks.md).

slices     the data in memory, and batches as functions of (seed, step)
networks   the networks, made of MONAI's parts
unets      the U-Net peers: what each learns from, its loss, what it draws
draws      all that a U-Net peer draws of one slice, over views and zooms
drawn      what a model drew of a case, beside its annotators' masks
training   one trainer for all U-Net peers
diffusion  the diffusion peers: cdiff's own trainer, exporter and evaluation
score      all of them on one scale
"""
