"""Pictures of a comparison: `pictures/` has one class per kind, the other files what the kinds share."""
