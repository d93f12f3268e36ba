"""`python -m grok` is `grok`."""

from grok.cli.main import main

main()
