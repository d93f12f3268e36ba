"""`grok serve`: a model over HTTP, in the words of OpenAI's completions interface."""
