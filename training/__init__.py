"""Raw tiles become shards, shards become a model bundle."""
