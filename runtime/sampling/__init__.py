"""The reverse chain: schedule, sampler, noise, windows, batches and the running sums."""
