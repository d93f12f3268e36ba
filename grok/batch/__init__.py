"""`grok batch`: files of requests in, files of answers out, killed and continued at will."""
