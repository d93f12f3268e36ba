"""`grok data prepare`: files of text to a token dataset."""
