"""Records to judgement: which results are comparable, which is best, which differ by more than chance."""
