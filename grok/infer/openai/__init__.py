"""OpenAI's completions interface: requests in, responses out."""
