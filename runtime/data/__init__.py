"""Data sets: cases with several annotators' masks, in every layout, read and checked."""
