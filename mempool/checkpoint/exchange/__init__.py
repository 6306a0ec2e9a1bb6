"""A table as one file: written row by row, and read from what others write: memory layers, embeddings, torch.save."""
