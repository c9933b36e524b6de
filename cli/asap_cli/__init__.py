"""The command line: composition root of the library; may import everything, lazily."""
