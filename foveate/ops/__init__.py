"""Mathematics that methods share: diversity, clustering, matching, merging, relevance."""
