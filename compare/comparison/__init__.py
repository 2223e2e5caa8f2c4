"""Records to judgement: which results compare, what is best, what differs by more than chance."""
