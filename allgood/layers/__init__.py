"""Parts that two or more methods share: the memory bank, its coreset and search, the store of
patches, and the guess of an image's category."""
