"""Parts that two or more methods share: greedy coreset, nearest-neighbour search, the store of
patches."""
