"""Parts of detectors: what two or more share (memory bank and its search, tokens of a grid, cosine
distances, the guess of an image's category), and what would make one method's file too long."""
