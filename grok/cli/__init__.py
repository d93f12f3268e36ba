"""The command line: one thin module per command, imported without anything heavy."""
