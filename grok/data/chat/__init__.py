"""Conversations as tokens: chat templates, their sandbox, and the tokens that assistants wrote."""
