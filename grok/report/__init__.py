"""Pages about runs, for people: everything is read from the folders that runs leave."""
