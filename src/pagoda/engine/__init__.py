"""The engine: requests of token ids become token ids. Strings live above, in `text/`."""
