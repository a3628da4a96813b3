"""SASRec: which item a user will turn to next, from the items so far in their order."""
