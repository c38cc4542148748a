"""A scan of any format to slices on a grid, and where in it to look."""
