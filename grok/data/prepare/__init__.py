"""`grok data prepare`: files of text to a prepared dataset."""
