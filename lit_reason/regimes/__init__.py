"""One folder a training regime; a new method is a new folder, nothing to register."""
