"""Folder on disk -> Sample -> Batch: readers, safe picture reading, geometry, batches.

Nothing is imported here, so that `allgood.data.readers` and `.images` stay free of torch."""
