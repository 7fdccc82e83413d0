"""Finding things in one's own images: an index of their embeddings, and the search in it.  Needs the extra `search`."""
