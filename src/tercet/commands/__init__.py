"""The functions that commands call: their parameters are the command's arguments, see `tercet.arguments`."""
