"""The graph behind the losses: which calls it holds, in which rows each example lies, where parameters enter."""
