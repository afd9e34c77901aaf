"""Pictures of what a model learned: arrays in `maps`, `embeddings`, ...; figures of matplotlib in `figures`."""
