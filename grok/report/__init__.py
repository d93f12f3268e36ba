"""Reports of runs as HTML pages and pictures, read from the folders that runs leave."""
