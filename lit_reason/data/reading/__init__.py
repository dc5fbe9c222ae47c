"""Records from files of any known kind, as conversations; and back into files."""
