"""The queries that score the cache: which tokens, kept where, turned how."""
