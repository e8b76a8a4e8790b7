"""How good students are: classification here, retrieval in the ranking core."""
