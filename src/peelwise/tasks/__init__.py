"""What peelwise does with a model, a folder for each: audit, peel, yes, quantise, quantcheck, check, ..."""
