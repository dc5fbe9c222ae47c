"""Who gets the credit: from rewards of turns and outcome to an advantage of every turn or token."""
